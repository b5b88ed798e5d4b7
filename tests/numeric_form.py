"""The numbers inside a value, in a form that names, keys and types of containers do not change."""

import dataclasses
import hashlib
import json

import numpy
import pandas
import torch

DEEPEST = 5
MOST = 2000
NUMBERS = (bool, int, float, complex, numpy.generic)


def leaves(value, depth: int = 0):
    """Yield the arrays and numbers inside a value: (kind, what identifies it)."""
    if value is None or isinstance(value, (str, bytes, type)) or depth > DEEPEST:
        return
    if isinstance(value, NUMBERS):
        yield from number_leaf(value)
    elif isinstance(value, torch.Tensor):
        yield from array_leaves(tensor_array(value))
    elif isinstance(value, numpy.ndarray):
        yield from array_leaves(value)
    elif isinstance(value, torch.nn.Module):
        for tensor in value.state_dict().values():
            yield from leaves(tensor, depth + 1)
    elif isinstance(value, pandas.DataFrame):
        for column in range(value.shape[1]):
            yield from array_leaves(value.iloc[:, column].to_numpy())
    elif isinstance(value, (pandas.Series, pandas.Index)):
        yield from array_leaves(value.to_numpy())
    else:
        yield from container_leaves(value, depth)


def number_leaf(value):
    """Yield one number; NumPy's are as Python's."""
    if isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, (bool, int, float, complex)):
        yield "number", repr(value)


def tensor_array(tensor):
    """Return a tensor as an array, also those of types that NumPy lacks."""
    tensor = tensor.detach().cpu()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.resolve_conj().numpy()


def array_leaves(array):
    """Yield an array by type, shape and bytes; one of objects by its numbers in order."""
    if array.dtype == object:
        inside = [repr(leaf) for item in array.ravel()[:MOST] for leaf in leaves(item, 1)]
        if inside:
            yield "array", f"object {array.shape} {inside}"
        return
    if array.dtype.kind not in "biufc" or not array.size:
        return
    numbers = numpy.ascontiguousarray(array)
    digest = hashlib.sha256(numbers.tobytes()).hexdigest()
    yield "array", f"{array.dtype} {array.shape} {digest}"


def container_leaves(value, depth: int):
    """Yield what is inside containers and inside objects of the package."""
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, (list, tuple)):
        items = list(value)
        if items and all(isinstance(item, NUMBERS) for item in items):
            yield "list", repr([leaf for item in items for leaf in number_leaf(item)])
            return
    elif isinstance(value, (set, frozenset)):
        yield from set_leaf(value)
        return
    else:
        items = attribute_values(value)
    for item in items[:MOST]:
        yield from leaves(item, depth + 1)


def set_leaf(value):
    """Yield the numbers of a set, sorted."""
    inside = sorted(repr(leaf) for item in value for leaf in leaves(item, 1))
    if inside:
        yield "set", repr(inside)


def attribute_values(value) -> list:
    """Return the attributes of an object of the package; of a learner, its model."""
    model = getattr(value, "model", None)
    if isinstance(model, torch.nn.Module) and hasattr(value, "dls"):
        return [model]
    module = type(value).__module__
    if module != "__main__" and module.partition(".")[0] != "gcode_ml":
        return []
    if callable(value) and hasattr(value, "__code__"):
        return []
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return [item for item in getattr(value, "__dict__", {}).values() if not callable(item)]


def hashes(value) -> list:
    """Return (hash, short description) of every leaf of a value."""
    found = []
    for kind, text in leaves(value):
        digest = hashlib.sha256(f"{kind} {text}".encode()).hexdigest()[:20]
        found.append((digest, f"{kind} {text[:60]}"))
        if len(found) >= MOST:
            break
    return found


def file_values(path) -> list:
    """Return what a data file holds: arrays, tables, or the numbers of a JSON file."""
    import safetensors.numpy

    suffix = path.suffix.lower()
    if suffix == ".npy":
        return [numpy.load(path)]
    if suffix == ".npz":
        with numpy.load(path) as file:
            return [file[name] for name in file.files]
    if suffix == ".parquet":
        return [pandas.read_parquet(path)]
    if suffix == ".csv":
        return [pandas.read_csv(path)]
    if suffix == ".safetensors":
        return list(safetensors.numpy.load_file(path).values())
    if suffix == ".json":
        return [json.loads(path.read_text(encoding="utf-8"))]
    return [numpy.frombuffer(path.read_bytes(), dtype="uint8")]
