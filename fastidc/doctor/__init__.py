"""`fastidc doctor`: what is here, what each op runs on, what a training step has, and what each absence costs."""

import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

import fastidc
from fastidc.doctor import choices, machine, packages

WIDTH = 100


def examine(data: str | Path | None = None) -> dict[str, Any]:
    """Everything that `text_of` prints, for JSON. data: the folder where a cache would lie; by default this one.

    Imports what is installed, asks the driver for its devices and Java for its version; starts nothing else. FastidcError where FASTIDC_BACKEND
    names what is not there.
    """
    devices, driver = machine.devices(), machine.driver()
    device = "cuda" if devices else "cpu"
    room = machine.memory(Path(data) if data is not None else Path.cwd())
    chosen = {"backends": choices.backends(device), "steps": choices.steps(device)}  # first: they may refuse
    found = [packages.look(package) for package in packages.PACKAGES]
    return {
        "versions": {"fastidc": fastidc.__version__, "python": sys.version.split()[0], "cuda": torch.version.cuda}
        | {name: packages.version_of(name) for name in packages.BASE},
        "devices": devices,
        "driver": driver,
        "no_device": machine.without_device(devices, driver),
        "packages": found,
        "cuda": packages.cuda_majors(found),
        "java": machine.java(),
        "memory": room,
        "caches": machine.caches(torch.device(device), room),
    } | chosen


def text_of(facts: dict[str, Any]) -> str:
    """What `examine` found, as text of at most `WIDTH` columns."""
    parts = [_versions(facts), _packages(facts), _room(facts), _backends(facts["backends"])]
    parts += [_step(step) for step in facts["steps"]]
    return "\n\n".join("\n".join(line for text in part for line in _wrapped(text)) for part in parts)


def _wrapped(text: str) -> list[str]:
    """``text`` in lines of at most `WIDTH` columns, those that follow further in."""
    indent = len(text) - len(text.lstrip())
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=" " * (indent + 4), break_on_hyphens=False) or [""]
    return [line.replace("\u00a0", " ") for line in lines]


def _gb(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:,.1f} GB"


def _versions(facts: dict[str, Any]) -> list[str]:
    versions = facts["versions"]
    base = ", ".join(f"{name}\u00a0{versions[name] or 'absent'}" for name in packages.BASE if name != "torch")
    lines = [
        f"fastidc {versions['fastidc']}, Python {versions['python']}, torch {versions['torch']} (CUDA {versions['cuda']})",
        f"{base}",
        f"CUDA devices: {'none, ' + facts['no_device'] if not facts['devices'] else len(facts['devices'])}",
    ]
    lines += [
        f"  {device['name']}, compute capability {device['capability']}, {_gb(device['memory_bytes'])}, of which {_gb(device['free_bytes'])} free"
        for device in facts["devices"]
    ]
    return [*lines, f"driver: {facts['driver'] or 'none'}", f"java: {facts['java']['said']}"]


def _packages(facts: dict[str, Any]) -> list[str]:
    lines = []
    for package in facts["packages"]:
        known = " ".join(part for part in (package["name"], package["version"]) if part)
        if (package["wheel"] or package["name"]).lower() != package["name"].lower():
            known += f" ({package['wheel']})"
        state = "" if package["state"] == "here" else f" {package['state']}:"
        lines.append(f"{known}{state}{',' if package['said'] and not state else ''} {package['said']}".rstrip())
    majors = ", ".join(f"{name} {major or 'none'}" for name, major in facts["cuda"]["majors"].items())
    return [*lines, f"CUDA majors: {majors}", *(f"  {sentence}" for sentence in facts["cuda"]["said"])]


def _room(facts: dict[str, Any]) -> list[str]:
    room, device = facts["memory"], facts["backends"]["device"]
    lines = [
        f"room for a cache of {machine.SIZE} x {machine.SIZE} pixels in {room['folder']}: {_gb(room['disk_free_bytes'])} of disk free"
        + ("" if room["writable"] else ", which you may not write to (name another place with --out)"),
        f"memory: {_gb(room['host_free_bytes'])} of the host's are free"
        + "".join(f", {_gb(one['free_bytes'])} of {one['name']}" for one in facts["devices"][:1]),
    ]
    for cache in facts["caches"]:
        fits = "" if cache["room"] else ", for which the disk has no room"
        lines.append(f"  {cache['data']}: {_gb(cache['bytes'])}{fits}; on {device} --loader auto takes {cache['loader']}, {cache['said']}")
    return [*lines, "  without a cache --loader auto takes pillow, which decodes anew in every epoch what exceeds 2 GiB."]


def _backends(facts: dict[str, Any]) -> list[str]:
    """Which backend serves each call, and what the others refuse, each sentence once."""
    lines, said = [f"backends on {facts['device']} in training, {facts['dtype']}:"], set()
    for call in facts["calls"]:
        op = call["call"].partition(",")[0]
        lines.append(f"  {call['call']}: {call['backend'] or 'none; ' + call['said']}")
        for backend, refusals in call["refusals"].items():
            new = [sentence for sentence in refusals if (op, backend, sentence) not in said]
            said.update((op, backend, sentence) for sentence in new)
            lines += [f"    {backend}: {' '.join(new)}"] if new else []
    return lines


def _step(step: dict[str, Any]) -> list[str]:
    head = f"a training step of {step['stage']} on {step['device']}, {step['precision']}, one process, official recipe:"
    return [head, *(f"  {line}" for line in step["lines"]), f"  never computed, whatever the device: {'; '.join(step['never'])}"]
