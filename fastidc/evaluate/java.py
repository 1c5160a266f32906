"""The two Java programs that caption scores rest on, driven so that a bad caption, locale or install cannot bend a number.

The jars are pycocoevalcap's own; its drivers are not used. Each fault that they have (``data_evaluation.md`` 3.3) is answered here: no
temporary file (the tokeniser reads its standard input), a counted number of lines, a fixed locale and encoding, a drained error pipe,
paths with blanks, and a reason in words where Java is missing. Nothing in this module starts Java when it is imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from fastidc.evaluate.paraphrases import table_for

# The METEOR jar prints numbers in the locale of the JVM and reads them back with a point: a comma locale crashes it.
_BRIEF = (
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
)  # for a second or two: what the second compiler makes is not used as long as it takes
_SETTINGS = (
    "-Duser.language=en",
    "-Duser.country=US",
    "-Duser.language.format=en",
    "-Duser.country.format=US",
    "-Dfile.encoding=UTF-8",
    "-Dstdout.encoding=UTF-8",
    "-Dsun.stdout.encoding=UTF-8",
)
_START_LIMIT = 300.0  # seconds that a JVM may take before it is given up; it takes 6 on an idle core


class JavaError(RuntimeError):
    """Java, or a jar, did not do its part; the message is the reason that a score table prints."""


def find_java() -> str | None:
    """Path of the ``java`` program on PATH, else under ``JAVA_HOME``, else None. Starts nothing."""
    found = shutil.which("java")
    if found is None and os.environ.get("JAVA_HOME"):
        found = shutil.which("java", path=os.path.join(os.environ["JAVA_HOME"], "bin"))
    return found


def java_status() -> tuple[bool, str]:
    """Whether METEOR can be had here, and a line on it: ``(True, "java found: openjdk version ...")``. Starts ``java -version``."""
    try:
        _jar("meteor", "meteor-1.5.jar")
        done = subprocess.run([_java(), "-version"], capture_output=True, text=True, errors="replace", timeout=60, env=_environment())
    except (JavaError, OSError, subprocess.SubprocessError) as error:
        return False, str(error)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip() and not line.startswith("Picked up")]
    text = lines[0].strip() if lines else f"exit code {done.returncode}"
    return done.returncode == 0, f"java found: {text}" if done.returncode == 0 else f"java does not run: {text}"


def _java() -> str:
    java = find_java()
    if java is None:
        raise JavaError("there is no java on PATH or under JAVA_HOME; install a Java runtime (8 or newer)")
    return java


def _jar(package: str, name: str) -> Path:
    spec = find_spec("pycocoevalcap")
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(root).resolve() / package / name
        if path.is_file():
            return path
    raise JavaError(f"{package}/{name} of pycocoevalcap is not installed; run `pip install pycocoevalcap`")


def _environment() -> dict[str, str]:
    """JAVA_TOOL_OPTIONS yields to the command line, but _JAVA_OPTIONS outranks it: there the settings go last once more."""
    environment = dict(os.environ)
    if environment.get("_JAVA_OPTIONS"):
        environment["_JAVA_OPTIONS"] = " ".join((environment["_JAVA_OPTIONS"], *_SETTINGS))
    return environment


def ptb_lines(sentences: Sequence[str]) -> list[str]:
    """Stanford PTBTokenizer (CoreNLP 3.4.1, lower case) over sentences that hold no line separator, in one JVM.

    Returns one line of blank-separated tokens per sentence, punctuation included. The tokeniser looks over a line end (an abbreviation
    before a capital), so the lines go in as the official scorer sends them: all, in order, the empty ones too.
    Raises JavaError where Java or the jar fails, or where the number of lines that come back is another one.
    """
    if not sentences:
        return []
    command = [_java(), *_SETTINGS, *_BRIEF, "-cp", str(_jar("tokenizer", "stanford-corenlp-3.4.1.jar"))]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    try:
        done = subprocess.run(
            command,
            input="\n".join(sentences).encode("utf-8", "replace"),
            capture_output=True,
            env=_environment(),
            timeout=_START_LIMIT + 0.01 * len(sentences),
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise JavaError(f"the PTB tokeniser did not run: {error}") from error
    if done.returncode != 0:
        raise JavaError(
            f"the PTB tokeniser ended with code {done.returncode}: {_last(done.stderr.decode('utf-8', 'replace').splitlines())}"
        )
    lines = done.stdout.decode("utf-8", "replace").split("\n")
    if len(lines) != len(sentences):
        raise JavaError(f"the PTB tokeniser gave {len(lines)} lines for {len(sentences)} sentences")
    return lines


def _last(lines: Sequence[str]) -> str:
    """The line of a Java error output that says what went wrong: the exception, else the last line."""
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("Picked up ")]
    named = [line for line in lines if "Exception" in line or "Error" in line]
    return (named or lines or ["no message"])[0 if named else -1][:300]


class Meteor:
    """One METEOR 1.5 process (``-l en -norm``, as pycocoevalcap runs it), for any number of evaluations.

    ``words``: those of all sentences that it will be asked about, as `fastidc.evaluate.paraphrases.words_of` gives them; its table of paraphrases
    then holds no others, and is read in half a second instead of ten. Making that table takes 4 s for words that are new, until ``stop`` is set
    (StoppedError). None: the whole table. Not for two threads at a time. A context manager; ``close`` may be called twice and never raises.
    Raises JavaError where Java or the jar is missing, and from every method once the process has failed.
    """

    def __init__(self, words: frozenset[str] | None = None, stop: threading.Event | None = None) -> None:
        jar = _jar("meteor", "meteor-1.5.jar")
        self.words, java, whole = words, _java(), Path("data", "paraphrase-en.gz")
        table = jar.parent / whole if words is None else table_for(words, jar.parent / whole, stop)
        command = [java, *_SETTINGS, "-Xmx2G", "-XX:+UseSerialGC", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
        # Left to itself the jar looks for the table under its own URL, where a blank is written %20.
        command += ["-a", str(whole if table == jar.parent / whole else table.absolute())]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, cwd=jar.parent, stdin=pipe, stdout=pipe, stderr=pipe, env=_environment())
        except OSError as error:
            raise JavaError(f"METEOR did not start: {error}") from error
        self._errors: deque[str] = deque(maxlen=40)
        self._drain = threading.Thread(target=self._read_errors, daemon=True)
        self._drain.start()

    def knows(self, words: frozenset[str]) -> bool:
        """Whether sentences of these words may be asked about."""
        return self.words is None or words <= self.words

    def __enter__(self) -> Meteor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def segments(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str], progress: bool = False) -> list[str]:
        """Match statistics of every pair, one line of numbers each: tokenised references [N][R] and hypotheses [N].

        The same captions of the same references are asked for once. ``progress``: a bar on a terminal.
        """
        from tqdm import tqdm

        asked = [_score_line(refs, hypothesis) for refs, hypothesis in zip(references, hypotheses, strict=True)]
        lines = list(dict.fromkeys(asked))
        # One thread writes them all while this one reads: with a question for each answer, a busy interpreter lock costs 5 ms a caption.
        writer = threading.Thread(target=self._write, args=("\n".join(lines),), daemon=True)
        with self._watch(_START_LIMIT + 0.5 * len(hypotheses)):
            writer.start()
            shown = tqdm(lines, desc="METEOR", unit="caption", leave=False, delay=1, disable=None if progress else True)
            answers = {line: self._statistics() for line in shown}
        writer.join()
        return [answers[line] for line in asked]

    def corpus(self, segments: Sequence[str]) -> tuple[float, list[float]]:
        """Corpus score of a set of segments (statistics added up first, so it is no mean), and the score of each."""
        if not segments:
            raise ValueError("METEOR needs at least one segment")
        with self._watch(_START_LIMIT + 0.05 * len(segments)):
            self._write(" ||| ".join(("EVAL", *segments)))
            scores = [self._number() for _ in range(len(segments) + 1)]
        return scores[-1], scores[:-1]

    def close(self) -> None:
        """End the process and wait for it."""
        self._process.kill()
        self._process.wait()
        self._drain.join(timeout=5)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(OSError):  # what was still buffered for a process that is gone
                stream.close()

    def _statistics(self) -> str:
        line = self._read()
        try:
            [float(word) for word in line.split()]
        except ValueError:
            self._process.kill()
            raise JavaError(f"METEOR answered {line[:120]!r} instead of statistics") from None
        return line

    def _number(self) -> float:
        line = self._read()
        try:
            return float(line)
        except ValueError:
            self._process.kill()
            raise JavaError(f"METEOR answered {line[:120]!r} instead of a score") from None

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a process that is gone: the read that follows says why
            self._process.stdin.write(text.encode("utf-8", "replace") + b"\n")
            self._process.stdin.flush()

    def _read(self) -> str:
        try:
            line = self._process.stdout.readline()
        except (OSError, ValueError):
            line = b""
        if not line.strip():
            raise JavaError(self._why())
        return line.decode("utf-8", "replace").strip()

    def _why(self) -> str:
        self._process.kill()
        self._drain.join(timeout=5)
        return f"METEOR stopped: {_last(list(self._errors))}"

    def _read_errors(self) -> None:
        try:
            for line in self._process.stderr:
                self._errors.append(line[:2000].decode("utf-8", "replace"))
        except (OSError, ValueError):  # closed under the reader
            return

    def _watch(self, seconds: float) -> _Watch:
        return _Watch(self._process, self._errors, seconds)


def _score_line(references: Sequence[str], hypothesis: str) -> str:
    # As pycocoevalcap writes it; the separator is taken out of the references also, or they would count as more of them.
    *references, hypothesis = (text.replace("|||", "") for text in (*references, hypothesis))
    return " ||| ".join(("SCORE", *references, hypothesis.replace("  ", " ")))


class _Watch:
    """Kills a process that has not answered within a limit, so that the blocked read ends with a reason."""

    def __init__(self, process: subprocess.Popen, errors: deque[str], seconds: float) -> None:
        def give_up() -> None:
            errors.appendleft(f"TimeoutError: no answer within {seconds:.0f} s")
            process.kill()

        self._timer = threading.Timer(seconds, give_up)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
