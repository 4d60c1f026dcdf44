"""Small changes of a place: each gives a function of the folder that makes one."""
import io
import json
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import torch
from hard.place import put, with_places
from PIL import Image
from safetensors.torch import load_file, save


def file(path, content=b""):
    "A file with some content, in place of what was there."
    return lambda folder: put(at(folder, path), content)


def at(folder, path):
    "A path in a folder; places may stand in braces."
    return folder/with_places(path)


def gone(path):
    "Nothing there."
    def make(folder):
        found = at(folder, path)
        if found.is_dir(): shutil.rmtree(found)
        else: found.unlink()
    return make


def cut(path, share=0.5):
    "The first part of a file."
    def make(folder):
        content = at(folder, path).read_bytes()
        put(at(folder, path), content[:int(len(content) * share)])
    return make


def replaced(path, old, new):
    "Other words in a text file."
    def make(folder):
        content = at(folder, path).read_bytes()
        assert old.encode() in content, path
        put(at(folder, path), content.replace(old.encode(), new.encode()))
    return make


def node(path, keys, value):
    "Another value in a JSON file: `keys` are a path like parameters.lr."
    def make(folder):
        *above, last = keys.split(".")
        content = place = json.loads(at(folder, path).read_text())
        for key in above: place = place[key]
        place[last] = value
        put(at(folder, path), json.dumps(content))
    return make


def folder(path):
    "An empty folder."
    return lambda place: at(place, path).mkdir(parents=True)


def moved(old, new):
    "Another name."
    def make(folder):
        at(folder, new).parent.mkdir(parents=True, exist_ok=True)
        at(folder, old).rename(at(folder, new))
    return make


def raw_folder(path):
    "A class folder whose name is bytes, with an image."
    def make(folder):
        place = os.path.join(os.fsencode(folder), path)
        os.mkdir(place)
        shutil.copy(os.path.join(os.fsencode(folder), b"new/0.png"), os.path.join(place, b"0.png"))
    return make


def copied(old, new):
    "A copy of a file or folder."
    def make(folder):
        goal = at(folder, new)
        if at(folder, old).is_dir(): return shutil.copytree(at(folder, old), goal, dirs_exist_ok=True)
        goal.parent.mkdir(parents=True, exist_ok=True)
        return put(goal, at(folder, old).read_bytes())
    return make


def link(path, goal):
    "A symbolic link."
    def make(folder):
        at(folder, path).parent.mkdir(parents=True, exist_ok=True)
        at(folder, path).unlink(missing_ok=True)
        at(folder, path).symlink_to(goal)
    return make


def pipe(path):
    "A named pipe, which nobody writes to."
    def make(folder):
        at(folder, path).unlink(missing_ok=True)
        os.mkfifo(at(folder, path))
    return make


def sparse(path, size=2**40):
    "A file of that length and no content."
    def make(folder):
        put(at(folder, path))
        os.truncate(at(folder, path), size)
    return make


# ---- images

def image(path, kind, **settings):
    "A picture in some format, whatever the name says."
    def make(folder):
        content = io.BytesIO()
        Image.new("RGB", (16, 16), (9, 99, 199)).save(content, kind, **settings)
        put(at(folder, path), content.getvalue())
    return make


def values(path, array):
    "A TIFF of numbers."
    def make(folder):
        content = io.BytesIO()
        Image.fromarray(np.asarray(array)).save(content, "TIFF")
        put(at(folder, path), content.getvalue())
    return make


def bomb(path, side=60_000):
    "A PNG of a few bytes that says it is very large."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I",
        zlib.crc32(kind + data))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return file(path, content + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def strip(path, length=60_000):
    "A picture of one row, which a model's transform would make very large."
    def make(folder):
        content = io.BytesIO()
        Image.new("RGB", (length, 1)).save(content, "JPEG" if path.endswith("jpg") else "PNG")
        put(at(folder, path), content.getvalue())
    return make


# ---- weights

class Evil:
    "What makes a folder `executed` when it is unpickled."
    def __reduce__(self): return os.mkdir, ("executed",)


def evil(path):
    "A pickle that would run code."
    return file(path, pickle.dumps({"model": Evil()}))


def evil_torch(path):
    "A file of torch.save that would run code."
    content = io.BytesIO()
    torch.save({"state_dict": Evil()}, content)
    return file(path, content.getvalue())


def tensors(path, change):
    "A safetensors file whose tensors are changed."
    def make(folder):
        found = load_file(at(folder, path))
        change(found)
        put(at(folder, path), save(found, metadata=metadata(at(folder, path))))
    return make


def metadata(path):
    "That of a safetensors file."
    content = path.read_bytes()
    return json.loads(content[8:8 + int.from_bytes(content[:8], "little")]).get("__metadata__")


def fewer_rows(found):
    for name, tensor in found.items():
        if tensor.dim(): found[name] = tensor[:-1].contiguous()


def not_finite(found):
    for tensor in found.values():
        if tensor.is_floating_point(): tensor.view(-1)[0] = float("nan")


def other_weights(found):
    for tensor in found.values():
        if tensor.is_floating_point(): tensor.add_(0.01)


def header(path, length):
    "A safetensors file whose header says it is that long."
    def make(folder):
        content = at(folder, path).read_bytes()
        put(at(folder, path), struct.pack("<Q", length) + content[8:])
    return make


def several(*makers):
    "One after the other."
    def make(folder):
        for maker in makers: maker(folder)
    return make
