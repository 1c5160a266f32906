"""Model files that somebody made to do harm, or that are merely broken: nothing in them runs, and each gets its sentence."""

import builtins
import json
import os
import pickle
import struct
import time
import zipfile

import pytest
import torch

from fastidc.checkpoint import archives, header
from fastidc.checkpoint.load import load_file
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC


class Calls:
    """Pickled, it is a call that its reader makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def gadgets(mark):
    """Calls that leave a file ``mark`` where one is made."""
    code = f"open({str(mark)!r}, 'w').close()"
    return {
        "system": Calls(os.system, f"touch {mark}"),
        "eval": Calls(builtins.eval, f"__import__('os').mkdir({str(mark)!r})"),
        "exec": Calls(builtins.exec, code),
        "write": Calls(builtins.open, str(mark), "w"),
        "getattr": Calls(builtins.getattr, Calls(builtins.__import__, "os"), "system"),
    }


def refused(path, sentence="cannot be read as a checkpoint"):
    with pytest.raises(FastidcError, match=sentence) as caught:
        load_file(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def repacked(old, new, change):
    """The zip ``old`` as ``new``, each member as ``change(name, bytes)`` gives it: (name, bytes, compression)."""
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w") as out:
        for name in source.namelist():
            member, data, how = change(name, source.read(name))
            out.writestr(member, data, compress_type=how)
    return new


@pytest.mark.parametrize("kind", ["system", "eval", "exec", "write", "getattr"])
def test_no_gadget_runs(tmp_path, kind):
    mark, gadget = tmp_path / "mark", gadgets(tmp_path / "mark")[kind]
    tensor = torch.ones(2)
    for name, held in (("flat", {"w": gadget}), ("nested", {"state_dict": {"w": tensor, "deep": [{"x": (1, gadget)}]}}), ("alone", gadget)):
        torch.save(held, tmp_path / f"{name}.pt")
        torch.save(held, tmp_path / f"{name}.bin", _use_new_zipfile_serialization=False)
        (tmp_path / f"{name}.pickle.bin").write_bytes(pickle.dumps(held))
        for file in (f"{name}.pt", f"{name}.bin", f"{name}.pickle.bin"):
            said = refused(tmp_path / file)
            assert "without running code of its own" in said or file.endswith("pickle.bin"), said
        (tmp_path / f"{name}.safetensors").write_bytes((tmp_path / f"{name}.pt").read_bytes())
        refused(tmp_path / f"{name}.safetensors", "says that its header has")
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.json").write_bytes(pickle.dumps(held))
        (tmp_path / "run" / "model.safetensors").write_bytes((tmp_path / f"{name}.bin").read_bytes())
        with pytest.raises(FastidcError, match=r"config.json: cannot be read as JSON"):
            CLIP4IDC.from_pretrained(tmp_path / "run")
    assert not mark.exists()
    torch.load(tmp_path / "flat.pt", weights_only=False) if kind == "write" else None
    assert mark.exists() == (kind == "write"), "the gadget must work where somebody lets it"


def scripted(path, module):
    torch.jit.script(module).save(str(path))
    return path


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
        self.halves = torch.nn.Parameter(torch.randn(4).half())
        self.tied = self.inner[0].weight
        self.register_buffer("size", torch.tensor(224))
        self.register_buffer("turned", torch.arange(12.0).view(3, 4).T)
        self.words = ["a", "b"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Restores(torch.nn.Module):
    """Of its own accord, by a program that torch's reader runs."""

    def __init__(self, mark: str):
        super().__init__()
        self.w, self.mark = torch.nn.Parameter(torch.ones(2)), mark

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.w, self.mark, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.w, self.mark, self.training = state[0], state[1], state[2]
        torch.save(self.w, self.mark)


def test_torchscript_is_read_and_never_run(tmp_path):
    mark = tmp_path / "mark"
    path = scripted(tmp_path / "restores.pt", Restores(str(mark)))
    refused(path, "restores itself by code of its own, which is not run")
    assert not mark.exists()
    torch.jit.load(str(path))
    assert mark.exists(), "torch's own reader runs it"
    plain = scripted(tmp_path / "plain.pt", Plain())
    theirs, ours = torch.jit.load(str(plain)).state_dict(), load_file(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], x) and ours[key].dtype == x.dtype and ours[key].stride() == x.stride() for key, x in theirs.items())
    assert ours["tied"].data_ptr() == ours["inner.0.weight"].data_ptr(), "stored once"


@pytest.mark.parametrize("member", ["data.pkl", "constants.pkl", "code/__torch__.py", "version"])
def test_gadgets_in_torchscript(tmp_path, member):
    mark, plain = tmp_path / "mark", scripted(tmp_path / "plain.pt", Plain())
    for number, gadget in enumerate(gadgets(mark).values()):
        for protocol in (0, 2, 4):
            evil = pickle.dumps({"w": gadget}, protocol=protocol)
            path = repacked(
                plain,
                tmp_path / f"{number}{protocol}.pt",
                lambda name, data, evil=evil: (name, evil if name.endswith(f"/{member}") else data, zipfile.ZIP_STORED),
            )
            if member == "data.pkl":
                refused(path)
            else:
                assert load_file(path), "what nobody reads"
    assert not mark.exists()


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


TUPLES = b")" + b"\x85" * 100_000
MODULE = b"c__torch__\nM\n)\x81q\x00"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ"
BUILT = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"%s%s%stR"


def of_tensor(count=b"K\x06", offset=b"K\x00", shape=b"K\x03K\x02\x86", stride=b"K\x02K\x01\x86"):
    return opcodes(MODULE, b"}X\x01\x00\x00\x00w", BUILT % (count, offset, shape, stride), b"sb")


@pytest.mark.parametrize(
    ("pickled", "sentence"),
    [
        (opcodes(MODULE, b"}", TUPLES, b"Nsb"), "a key that is no text"),
        (opcodes(MODULE, b"}X\x01\x00\x00\x00ah\x00sb"), "more than .* modules or tensors"),
        (opcodes(MODULE, b"}X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00sb"), "not that of a module"),
        (opcodes(b"N"), "it is no module"),
        (opcodes(b"0"), "the opcode POP is none of TorchScript's"),
        (b"", "not that of a module"),
        (of_tensor(count=b"J\x00\x00\x00\x40"), "does not fit the 24 bytes of its storage"),
        (of_tensor(offset=b"K\x01"), "reaches beyond its storage"),
        (of_tensor(offset=b"J\xff\xff\xff\xff"), "does not fit"),
        (of_tensor(shape=b"K\x03J\x00\x00\x00\x40\x86", stride=b"K\x00K\x00\x86"), "reaches beyond its storage"),
        (of_tensor(stride=b"K\x02J\xff\xff\xff\xff\x86"), "does not fit"),
        (of_tensor(shape=b"K\x06"), "a tensor of no storage"),
        (of_tensor(shape=b"\x88K\x06\x86"), "does not fit"),
    ],
)
def test_torchscript_that_lies(tmp_path, pickled, sentence):
    def change(name, data):
        return name, pickled if name.endswith("/data.pkl") else data, zipfile.ZIP_STORED

    plain = tmp_path / "plain.pt"
    with zipfile.ZipFile(plain, "w") as out:
        for name, data in (("m/data.pkl", b""), ("m/constants.pkl", b""), ("m/data/0", bytes(24))):
            out.writestr(name, data)
    assert load_file(repacked(plain, tmp_path / "good.pt", lambda name, data: (name, data or of_tensor(), 0)))["w"].shape == (3, 2)
    refused(repacked(plain, tmp_path / "bad.pt", change), sentence)


def test_archives_that_are_bombs_or_leave_their_folder(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    bomb = tmp_path / "bomb.pt"
    monkeypatch.setattr(archives, "SPARE", 1 << 20)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("bomb/data.pkl", b"x")
        out.writestr("bomb/data/0", bytes(1 << 21))
    assert bomb.stat().st_size < 1 << 14
    refused(bomb, r"its members claim 2,097,153 bytes in a file of")
    for name in ("../data/0", "/data/0", "good/../../x", "..\\x", "C:\\x"):
        repacked(tmp_path / "good.pt", tmp_path / "bad.pt", lambda old, data, name=name: (name if old.endswith("data/0") else old, data, 0))
        refused(tmp_path / "bad.pt", "would leave the archive's folder")
    with zipfile.ZipFile(tmp_path / "good.pt", "a") as out, pytest.warns(UserWarning, match="Duplicate name"):
        out.writestr("good/data/0", bytes(8))
    refused(tmp_path / "good.pt", "stands twice")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pt", "bomb.pt", "good.pt"]


def test_a_long_name_costs_no_minutes(tmp_path):
    """torch looks for its advice in its own sentence, in a time that grows with the square of the name's length."""
    evil = b"\x80\x02}X\x01\x00\x00\x00wcx\n" + b"x" * 200_000 + b"\n)Rs."
    started = time.monotonic()
    torch.save({"w": torch.ones(2)}, tmp_path / "good.bin", _use_new_zipfile_serialization=False)
    head = (tmp_path / "good.bin").read_bytes().split(b"\x80\x02}")[0]
    (tmp_path / "long.bin").write_bytes(head + evil)
    refused(tmp_path / "long.bin", "its pickle has a name of 200,002 signs")
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    path = repacked(tmp_path / "good.pt", tmp_path / "long.pt", lambda name, data: (name, evil if name.endswith("data.pkl") else data, 0))
    refused(path, "its pickle has a name of 200,002 signs")
    assert time.monotonic() - started < 10


def test_tensors_that_are_more_than_their_file(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "wide.pt")
    refused(tmp_path / "wide.pt", "has more numbers than the file holds of it")
    torch.save({"w": torch.ones(1, device="meta")}, tmp_path / "meta.pt")
    refused(tmp_path / "meta.pt", "sparse, quantised, complex, or without numbers")
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    refused(tmp_path / "sparse.pt")
    torch.save({str(i): x for x in [torch.ones(1000)] for i in range(99)}, tmp_path / "many.pt")
    assert len(load_file(tmp_path / "many.pt")) == 99
    monkeypatch.setattr(header, "available_bytes", lambda: 300_000)
    refused(tmp_path / "many.pt", r"holds 0.0 GB of tensors, and 0.0 GB of memory are free")


def safetensors(path, table, data=b"", length=None):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


SAFE = [
    ({"a": tensor(0, 8), "b": tensor(4, 12)}, 12, "tensor 'b' begins at byte 4 of the data, and 8 was expected"),
    ({"a": tensor(0, 8), "b": tensor(12, 16)}, 16, "tensor 'b' begins at byte 12"),
    ({"a": tensor(0, 8)}, 9, "its tensors have 8 bytes, and 9 follow its header"),
    ({"a": tensor(0, 1 << 44)}, 8, "its tensors have 17,592,186,044,416 bytes, and 8 follow"),
    ({"a": tensor(-4, 4)}, 8, "no shape and place of whole numbers"),
    ({"a": tensor(8, 0)}, 8, "no shape and place of whole numbers"),
    ({"a": tensor(0, 8, shape=[1 << 61, 1 << 61])}, 8, "has shape .* and lies from byte 0 to 8"),
    ({"a": tensor(0, 8, shape=[2.0])}, 8, "no shape and place of whole numbers"),
    ({"a": tensor(0, 8, shape=[True, 2])}, 8, "no shape and place of whole numbers"),
    ({"a": tensor(0, 8, "F33")}, 8, "tensor 'a' has the dtype 'F33', which is unknown"),
    ({"a": tensor(0, 8, ["F32"])}, 8, "which is unknown"),
    ({"a": "os.system"}, 8, "which is unknown"),
    (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "'a' stands twice"),
    (b'{"a":{"dtype":"F32","dtype":"F64","shape":[1],"data_offsets":[0,4]}}', 4, "'dtype' stands twice"),
    (b"[" * 100_000, 0, "its brackets are nested too deep"),
    (b'{"a": ' + b"9" * 5000 + b"}", 0, "its header is no JSON"),
    (b"\xff\xfe{}", 0, "its header is no JSON"),
    (b"[]", 0, "its header is no JSON object"),
    (b"", 0, "its header is no JSON"),
]


@pytest.mark.parametrize(("table", "size", "sentence"), SAFE)
def test_headers_that_lie(tmp_path, table, size, sentence):
    refused(safetensors(tmp_path / "x.safetensors", table, bytes(size)), sentence)


def test_headers_of_impossible_length(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    refused(safetensors(path, b"{}", length=1 << 60), "it has 10 bytes and says that its header has 1,152,")
    path.write_bytes(b"abc")
    refused(path, "it has 3 bytes")
    with path.open("wb") as file:  # of holes
        file.write(struct.pack("<Q", 50 << 20))
        file.truncate(60 << 20)
    refused(path, "its header has 52,428,800 bytes, more than the 16,777,216 that are read")
    safetensors(path, {"__metadata__": {"format": "pt"}, "a": tensor(0, 8), "e": tensor(8, 8)}, bytes(8))
    assert {name: list(x.shape) for name, x in load_file(path).items()} == {"a": [2], "e": [0]}
    monkeypatch.setattr(header, "available_bytes", lambda: 7)
    refused(path, "of memory are free; make room")
    monkeypatch.setattr(header, "MOST_TENSORS", 1)
    refused(path, "its header names 2 tensors, more than the 1 that are read")


@pytest.mark.parametrize(
    "config",
    [
        b"[" * 200_000,
        b'{"format": "fastidc", "model": {"dropout": NaN}}',
        b'{"format": "fastidc", "model": {"image_size": ' + b"9" * 5000 + b"}}",
        b'{"format": "fastidc", "model": ["x"]}',
        b"\xff\xfe{\x00}\x00",
        b"\x00" * 10,
        b"null",
    ],
)
def test_configs_that_are_none(tmp_path, config):
    (tmp_path / "config.json").write_bytes(config)
    safetensors(tmp_path / "model.safetensors", {})
    with pytest.raises(FastidcError, match=r"config.json") as caught:
        CLIP4IDC.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


VALUES = [None, True, -1, 1.5, float("nan"), 10**30, "x", [1], {}]


def test_every_field_of_a_config_may_be_anything(tmp_path):
    import worlds

    safetensors(tmp_path / "model.safetensors", {})
    for name in worlds.SMALL.to_dict():
        for value in VALUES:
            whole = {"format": "fastidc", "version": 1, "model": worlds.SMALL.to_dict() | {name: value}}
            (tmp_path / "config.json").write_text(json.dumps(whole))
            with pytest.raises(FastidcError):  # in the end a tensor is missing
                CLIP4IDC.from_pretrained(tmp_path)
    for name in ("fresh", "clip_extras", "recipe", "run", "preset"):
        for value in VALUES:
            (tmp_path / "config.json").write_text(json.dumps({"format": "fastidc", "model": worlds.SMALL.to_dict(), name: value}))
            with pytest.raises(FastidcError):
                CLIP4IDC.from_pretrained(tmp_path)


def test_files_without_end(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    safetensors(tmp_path / "model.safetensors", {})
    with pytest.raises(FastidcError, match=r"it has 1,073,741,824 bytes, more than the 67,108,864 that are read"):
        CLIP4IDC.from_pretrained(tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(FastidcError, match="no such checkpoint"):
        CLIP4IDC.from_pretrained(tmp_path / "pipe.pt")
