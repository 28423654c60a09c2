"""What a person, a disk or an attacker may have done to a file: from a seed, so that every one can be made again."""

import copy
import json
import random
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

STEERING = "\x1b[2J\u202eevil\nsecond line\x07"
"""What would clear a terminal, turn text around, write another line and ring."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [None], [[]], {"a": 1}, "", " ", "x", STEERING, "lone \ud800", "9" * 1001),
    *(0, 1, -1, 3, 0.5, -0.0, 1e-300, 1e308, -1e308, 2**31, 2**53 + 1, 2**64, 10**400, float("nan"), float("inf")),
)
"""What a key may hold instead of what belongs there."""


def document(value: Any, draw: random.Random, changes: int = 1) -> list[str]:
    """Change `value`, of JSON, in some places: another value, none, doubled, or moved; what was done."""
    done = []
    for _ in range(changes):
        holder, key, path = value, None, ""
        while isinstance(holder, dict | list) and holder:
            inner = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            path += f"/{inner}"
            if not (isinstance(holder[inner], dict | list) and holder[inner] and draw.random() < 0.8):
                key = inner
                break
            holder = holder[inner]
        if key is None:
            break
        how: Any = draw.choice(("another", "another", "another", "gone", "doubled", "text", "steering"))
        if how == "gone":
            del holder[key]
        elif how == "doubled":
            holder[key] = [copy.deepcopy(holder[key])] * 2
        elif how == "text":
            holder[key] = str(holder[key])
        elif how == "steering" and isinstance(holder, dict):
            holder[STEERING] = holder.pop(key)
        else:
            how = draw.choice(VALUES)
            holder[key] = copy.deepcopy(how)
        done.append(f"{path} {str(how)[:40]!r}")
    return done


def file(path: Path, draw: random.Random) -> str:
    """One way in which a file may be damaged, done to `path`; its name."""
    data = path.read_bytes()
    how = draw.choice(("gone", "empty", "cut", "flipped", "noise", "in it", "a folder", "a link to nothing", "a pipe"))
    if how in ("gone", "a folder", "a link to nothing", "a pipe"):
        path.unlink()
    at = draw.randrange(len(data))
    match how:
        case "a folder":
            path.mkdir()
        case "a link to nothing":
            path.symlink_to("nothing")
        case "a pipe":
            path.symlink_to("/dev/null")  # a named one would wait for its writer, as a shell's user expects
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(data[:at])
        case "flipped":
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
        case "noise":
            path.write_bytes(draw.randbytes(len(data)))
        case "in it":
            path.write_bytes(data[:at] + draw.randbytes(draw.choice((1, 2, 8, 512))) + data[at:])
    return f"{path.name} {how}"


def json_file(path: Path, draw: random.Random) -> str:
    """One or two keys of a JSON file have other values, or are gone; its name."""
    content = json.loads(path.read_text("utf-8"))
    done = document(content, draw, draw.choice((1, 1, 2)))
    path.write_text(json.dumps(content), "utf-8")
    return f"{path.name} {', '.join(done)}"


def tensor(path: Path, draw: random.Random) -> str:
    """One tensor is gone, has another name, shape or type, or holds no numbers; its name."""
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    found = tensors.pop(name)
    how = draw.choice(("gone", "renamed", "longer", "flat", "another type", "no numbers"))
    match how:
        case "renamed":
            tensors[f"{name}.other"] = found
        case "longer":
            tensors[name] = found.repeat(2, *[1] * (found.dim() - 1))
        case "flat":
            tensors[name] = found.reshape(-1)[:-1].clone()
        case "another type":
            tensors[name] = found.bool()
        case "no numbers":
            tensors[name] = found * float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name} {how}"


def folder_of_a_model(folder: Path, draw: random.Random) -> str:
    """One damage to one file of a saved model; its name."""
    path = draw.choice(
        [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jinja", ".safetensors")]
    )
    kinds = [file]
    if path.suffix == ".json":
        kinds += [json_file, json_file, json_file]
    if path.suffix == ".safetensors":
        kinds += [tensor, tensor]
    return draw.choice(kinds)(path, draw)


def corpus(path: Path, draw: random.Random) -> str:
    """One damage to a corpus; its name."""
    if draw.random() < 0.3:
        return file(path, draw)
    turns = json.loads(path.read_text("utf-8"))
    index = draw.randrange(len(turns))
    how = draw.choice(("a key", "a key", "a key", "shuffled", "less", "twice", "long", "turned", "nested", "encoding"))
    match how:
        case "a key":
            how = str(document(turns, draw, draw.choice((1, 2, 3))))
        case "shuffled":
            draw.shuffle(turns)
        case "less":
            del turns[index:]
        case "twice":
            turns.insert(index, turns[index])
        case "long":
            turns[index][draw.choice(("role", "content"))] = "긴 " * 100_000
        case "turned":
            turns = {"turns": turns} if draw.random() < 0.5 else turns[::-1]
        case "nested":
            path.write_text("[" * draw.choice((10, 10_000, 200_000)), "utf-8")
            return how
        case "encoding":
            how = draw.choice(("utf-16", "cp949", "utf-8-sig", "utf-7"))
            path.write_bytes(json.dumps(turns, ensure_ascii=False).encode(how))
            return how
    path.write_text(json.dumps(turns), "utf-8")
    return f"turn {index} {how}"
