"""Reads the text of a compiled program: which collectives it runs, how often, and what they move.

    for found in collectives(jitted.lower(*args).compile().as_text()):
        print(found.kind, found.times, found.traffic, found.op_name)

Sizes are those of one device, layouts' padding left out. How often a loop runs is XLA's own
note where it left one (CPU, GPU), else read off the counter of its condition (TPU).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all",
    "collective-broadcast",
)  # fmt: skip


class Loop(NamedTuple):
    """A while loop around a collective; `trips` is None where the program decides how often it runs."""

    name: str
    trips: int | None
    op_name: str


class Collective(NamedTuple):
    """One collective instruction, by what one device gives to it and gets from it.

    kind: of KINDS. Where a reduce-scatter was compiled to an all-reduce and a slice apart, an all-reduce.
    bytes: the whole array at one device: what all-gather returns, what the others are given.
    group: the devices of the first of the groups it runs in, by their places in the mesh; for a
        collective-permute the two of the first pair.
    times: how often it runs in one call of the program, None where a loop's trips are not known.
    loops: outermost first. conditional: in a branch, which need not be taken.
    """

    kind: str
    name: str
    shape: str
    bytes: int
    group: tuple[int, ...]
    times: int | None
    loops: tuple[Loop, ...]
    conditional: bool
    op_name: str

    @property
    def traffic(self) -> float:
        """Bytes that each device receives in one run, by the best known algorithm (a ring)."""
        others = (len(self.group) - 1) / len(self.group)
        return self.bytes * {"all-reduce": 2 * others, "collective-permute": 1}.get(self.kind, others)


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str
    is_root: bool

    @property
    def inputs(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.operands)

    @property
    def op_name(self) -> str:
        return self.attribute(r'op_name="([^"]*)"') or ""

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found and found.group(1)


_Computation = dict[str, _Instruction]  # by name


class _Program(NamedTuple):
    computations: dict[str, _Computation]
    entry: str
    devices: int


def collectives(text: str, unknown_trips: int | None = None) -> list[Collective]:
    """The collectives of a program, in the order they stand in.

    text: `compiled.as_text()`. unknown_trips: taken for loops that end by what they compute.
    Both branches of a conditional are listed. Collectives that are started and awaited apart,
    or run in pieces beside other work, are listed once.
    Raises ValueError on text that is none of a compiled program, or devices listed in a way unknown.
    """
    program = _parse(text)
    found, chains = [], set()
    for site in _walk(program, _Site(program.entry, None, (), False), unknown_trips):
        kind = site.instruction.opcode.removesuffix("-start")
        if kind == "all-reduce" and site.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # TPU fuses an all-reduce with the slice taken of it
        chain = site.instruction.attribute(r'(chain_id="\d+")')  # of the pieces of one: TPU's async fusions
        chain = chain and (chain, site.instruction.attribute(r"channel_id=(\d+)"))
        if kind in KINDS and chain not in chains:
            chains |= {chain} - {None}
            found.append(_collective(program, kind, site))
    return found


class _Site(NamedTuple):
    """An instruction and where it runs."""

    computation: str
    instruction: _Instruction | None
    loops: tuple[Loop, ...]
    conditional: bool


def _collective(program: _Program, kind: str, site: _Site) -> Collective:
    one, scope = site.instruction, program.computations[site.computation]
    group = _group(one, program.devices)
    size = sum(_bytes(scope[name].shape) for name in one.inputs)
    if kind == "all-gather":
        size *= len(group)
    trips = [loop.trips for loop in site.loops]
    times = None if None in trips else math.prod(trips)
    return Collective(kind, one.name, one.shape, size, group, times, site.loops, site.conditional, one.op_name)


def _walk(program: _Program, at: _Site, unknown_trips: int | None) -> Iterator[_Site]:
    """Every instruction that runs in a computation and those it calls, with the loops around it."""
    for one in program.computations[at.computation].values():
        yield at._replace(instruction=one)
        if one.opcode == "while":
            body, condition = one.attribute(r"body=%([\w.\-]+)"), one.attribute(r"condition=%([\w.\-]+)")
            trips = _trips(program, at.computation, one, body, condition)
            trips = unknown_trips if trips is None else trips
            for name, times in ((condition, None if trips is None else trips + 1), (body, trips)):
                loops = (*at.loops, Loop(one.name, times, one.op_name))
                yield from _walk(program, _Site(name, None, loops, at.conditional), unknown_trips)
        elif not one.opcode.endswith(("-done", "-update")):
            for name in _called(one):
                conditional = at.conditional or one.opcode == "conditional"
                yield from _walk(program, _Site(name, None, at.loops, conditional), unknown_trips)


_CALLED = r"(?:calls|to_apply|(?:true|false)_computation|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)"


def _called(one: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", " ".join(re.findall(_CALLED, one.attributes)))


# --------------------------------------------------------------------- text


def _parse(text: str) -> _Program:
    computations: dict[str, _Computation] = {}
    entry, here = "", {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            here = computations[head.group(2)] = {}
            entry = head.group(2) if head.group(1) else entry
        elif body := re.match(r"\s+(ROOT )?%([\w.\-]+) = (.*)$", line):
            shape, rest = _cut(body.group(3), " ")
            opcode, rest = rest.split("(", 1)
            operands, attributes = _cut("(" + rest, ",")
            here[body.group(2)] = _Instruction(
                body.group(2), shape, opcode, operands, attributes, body.group(1) is not None
            )
    if not entry:
        raise ValueError("no ENTRY in the text: not that of a compiled program")
    partitions, replicas = (re.search(rf"num_{name}=(\d+)", text) for name in ("partitions", "replicas"))
    return _Program(computations, entry, math.prod(int(n.group(1)) for n in (partitions, replicas) if n))


def _cut(text: str, end: str) -> tuple[str, str]:
    """Before and after the first `end` outside parentheses."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == end and not depth:
            return text[:i], text[i + 1 :]
    return text, ""


def _bytes(shape: str) -> int:
    """Of an array, or of all arrays of a tuple."""
    bits = 0
    for dtype, sizes in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        width = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
        bits += width * math.prod(int(n) for n in sizes.split(",") if n)
    return -(-bits // 8)


def _group(one: _Instruction, devices: int) -> tuple[int, ...]:
    """Devices of the first replica group, or of the first pair of a permutation."""
    if pair := one.attribute(r"source_target_pairs=\{\{([\d,]+)\}"):
        return tuple(int(n) for n in pair.split(","))
    if listed := one.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return tuple(int(n) for n in listed.split(","))
    if "replica_groups={}" in one.attributes:
        return tuple(range(devices))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", one.attributes):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        return tuple(np.arange(devices).reshape(dims).transpose(order).reshape(shape)[0].tolist())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](, device_ids=\([^ ]*\))? \{([^}]*)\}", one.attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
        places = _device_order(found.group(2) or "", devices).reshape(list(sizes.values()))
        axes = re.findall(r"'([^']+)'", found.group(3))
        if found.group(3).replace(" ", "") == ",".join(f"'{axis}'" for axis in axes):
            return tuple(places[tuple(slice(None) if name in axes else 0 for name in sizes)].ravel().tolist())
    raise ValueError(f"{one.opcode} {one.name}: devices in a notation unknown here: {one.attributes[:200]}")


def _device_order(text: str, devices: int) -> np.ndarray:
    """Of `device_ids=([2,4]T(1,0))`: the devices, laid out so and transposed; in their order without it."""
    shape, _, order = (re.findall(r"\d+", part) for part in text.partition("T"))
    ids = np.arange(devices)
    return ids.reshape([int(n) for n in shape]).transpose([int(n) for n in order] or None) if shape else ids


# --------------------------------------------------------------------- trips of a loop


def _trips(program: _Program, at: str, loop: _Instruction, body: str, condition: str) -> int | None:
    """XLA's own note, else by the counter: its start, its step and the limit it is compared with."""
    if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    computations = program.computations
    test = _root(computations[condition])
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    index = computations[condition][test.inputs[0]].attribute(r"index=(\d+)")
    limit = _value(computations[condition], test.inputs[1])
    start, after = computations[at][loop.inputs[0]], _root(computations[body])
    if index is None or limit is None or start.opcode != "tuple" or after.opcode != "tuple":
        return None
    first = _value(computations[at], start.inputs[int(index)])
    step = _value(computations[body], after.inputs[int(index)], counter=index)
    return None if first is None or not step else max(0, -(-(limit - first) // step))


def _root(computation: _Computation) -> _Instruction:
    return next(one for one in computation.values() if one.is_root)


def _value(computation: _Computation, name: str, counter: str = "") -> int | None:
    """Of a whole number made of constants; element `counter` of the parameter counts as 0."""
    one = computation[name]
    if one.opcode == "constant":
        return int(one.operands[1:-1]) if re.fullmatch(r"\(-?\d+\)", one.operands) else None
    if one.opcode == "copy":
        return _value(computation, one.inputs[0], counter)
    if one.opcode == "add":
        terms = [_value(computation, term, counter) for term in one.inputs]
        return None if None in terms else sum(terms)
    is_counter = one.opcode == "get-tuple-element" and one.attribute(r"index=(\d+)") == counter
    return 0 if is_counter and computation[one.inputs[0]].opcode == "parameter" else None
