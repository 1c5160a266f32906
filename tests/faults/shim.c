/* A disk that fails: preloaded, and harmless until `faults_arm` is called. Counts what is done to files whose path holds ROOT and then NEEDLE,
   and from the AT-th of these calls on does what KIND says. AT 0 only counts. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FULL, IO, READ_ONLY, QUOTA, SLOW, VANISH };
static const int ERRNO[] = {ENOSPC, EIO, EROFS, EDQUOT, 0, 0};

static char root[PATH_MAX], needle[PATH_MAX];
static int kind;
static long at;
static atomic_int armed;
static atomic_long count;

void faults_arm(const char *r, const char *n, int k, long a) {
    snprintf(root, sizeof root, "%s", r);
    snprintf(needle, sizeof needle, "%s", n);
    kind = k, at = a;
    count = 0;
    armed = 1;
}

long faults_count(void) { return count; }

#define REAL(ret, name, ...) \
    static ret (*real)(__VA_ARGS__); \
    if (!real) real = (ret(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int meant(const char *path) {
    const char *in = armed && path ? strstr(path, root) : NULL;
    return in && strstr(in + strlen(root), needle) != NULL;
}

static int meant_file(int fd) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return meant(path);
}

/* One such call: 0 where it may be made, else the error that it meets. GROWS: it needs room. NAMES: it changes names, or opens to write. */
static int struck(int grows, int names) {
    long now = atomic_fetch_add(&count, 1) + 1;
    if (at == 0 || now < at) return 0;
    switch (kind) {
    case FULL: case QUOTA: return grows ? ERRNO[kind] : 0;
    case IO: return now == at ? EIO : 0;                 /* once: it may be gone when one looks again */
    case READ_ONLY: return names ? EROFS : EIO;          /* as the kernel does to files that are open */
    case SLOW: usleep(10000); return 0;
    case VANISH:
        if (now == at) {
            char gone[PATH_MAX + 8];
            snprintf(gone, sizeof gone, "%s.gone", root);
            REAL(int, "rename", const char *, const char *);
            real(root, gone);
        }
        return 0;
    }
    return 0;
}

#define FAIL(test, grows, names, value) \
    if (test) { int error = struck(grows, names); if (error) { errno = error; return value; } }

#define OPENS(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list v; va_start(v, flags); mode = va_arg(v, mode_t); va_end(v); }

int open(const char *p, int flags, ...) {
    MODE REAL(int, "open", const char *, int, ...);
    FAIL(OPENS(flags) && meant(p), flags & O_CREAT, 1, -1)
    return real(p, flags, mode);
}
int open64(const char *p, int flags, ...) {
    MODE REAL(int, "open64", const char *, int, ...);
    FAIL(OPENS(flags) && meant(p), flags & O_CREAT, 1, -1)
    return real(p, flags, mode);
}
int openat(int d, const char *p, int flags, ...) {
    MODE REAL(int, "openat", int, const char *, int, ...);
    FAIL(OPENS(flags) && meant(p), flags & O_CREAT, 1, -1)
    return real(d, p, flags, mode);
}
int openat64(int d, const char *p, int flags, ...) {
    MODE REAL(int, "openat64", int, const char *, int, ...);
    FAIL(OPENS(flags) && meant(p), flags & O_CREAT, 1, -1)
    return real(d, p, flags, mode);
}

/* A full disk takes the half that still fits, and nothing after it. */
#define WRITES() \
    if (meant_file(fd)) { \
        int error = struck(1, 0); \
        if (error) { \
            if ((kind == FULL || kind == QUOTA) && count == at && n > 1) n /= 2; \
            else { errno = error; return -1; } \
        } \
    }

ssize_t write(int fd, const void *b, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    WRITES()
    return real(fd, b, n);
}
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    WRITES()
    return real(fd, b, n, o);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    WRITES()
    return real(fd, b, n, o);
}
ssize_t writev(int fd, const struct iovec *v, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    FAIL(meant_file(fd), 1, 0, -1)
    return real(fd, v, n);
}
ssize_t sendfile64(int fd, int from, off64_t *o, size_t n) {
    REAL(ssize_t, "sendfile64", int, int, off64_t *, size_t);
    FAIL(meant_file(fd), 1, 0, -1)
    return real(fd, from, o, n);
}
ssize_t sendfile(int fd, int from, off_t *o, size_t n) {
    REAL(ssize_t, "sendfile", int, int, off_t *, size_t);
    FAIL(meant_file(fd), 1, 0, -1)
    return real(fd, from, o, n);
}
int fsync(int fd) {
    REAL(int, "fsync", int);
    FAIL(meant_file(fd), 1, 0, -1)
    return real(fd);
}
int ftruncate64(int fd, off64_t n) {
    REAL(int, "ftruncate64", int, off64_t);
    FAIL(meant_file(fd), 0, 0, -1)
    return real(fd, n);
}
int posix_fallocate64(int fd, off64_t o, off64_t n) {
    REAL(int, "posix_fallocate64", int, off64_t, off64_t);
    if (meant_file(fd)) { int error = struck(1, 0); if (error) return error; }
    return real(fd, o, n);
}
int rename(const char *a, const char *b) {
    REAL(int, "rename", const char *, const char *);
    FAIL(meant(a) || meant(b), 0, 1, -1)
    return real(a, b);
}
int link(const char *a, const char *b) {
    REAL(int, "link", const char *, const char *);
    FAIL(meant(b), 1, 1, -1)
    return real(a, b);
}
int mkdir(const char *p, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    FAIL(meant(p), 1, 1, -1)
    return real(p, mode);
}
int unlink(const char *p) {
    REAL(int, "unlink", const char *);
    FAIL(meant(p), 0, 1, -1)
    return real(p);
}
int rmdir(const char *p) {
    REAL(int, "rmdir", const char *);
    FAIL(meant(p), 0, 1, -1)
    return real(p);
}
