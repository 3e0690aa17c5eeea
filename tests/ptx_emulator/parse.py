"""PTX text to a list of instructions: what LLVM and Triton's inline assembly write, one entry function, no calls."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)([^{]*)\{(.*)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.[bfsu](\d+)\s.*?(\w+)(?:\[(\d+)\])?\s*$")
_LABEL = re.compile(r"([$A-Za-z_][$\w]*):(?!:)\s*")
_GUARD = re.compile(r"@(!?)([%\w#]+)\s+")
_REGISTERS = re.compile(r"\.reg\s+\.(pred|[a-z](?:\d+))\s+(.+)")
_LOCATION = re.compile(r"\.loc\s+(\d+) (\d+) ")
_FILE = re.compile(r'\.file\s+(\d+) "([^"]*)"')
_COMMENT = re.compile(r"//[^\n]*")


class UnsupportedError(NotImplementedError):
    """PTX that the emulator doesn't know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its suffixes, such as "add.s32".
        operands: as they are written, vectors with their braces.
        guard: the predicate before it and whether it is negated, or None.
        line: where the kernel's source has it, such as "wgrad_triton.py:120".
    """

    opcode: str
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None
    line: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{'!' if self.guard[1] else ''}{self.guard[0]} "
        operands = ", ".join(o if len(o) < 40 else f"{o[:40]}..." for o in self.operands)
        return f"{guard}{self.opcode} {operands}"


@dataclass
class Kernel:
    """An entry function.

    Attributes:
        name: of the function.
        parameters: name and bytes of each.
        instructions: in the order of the text.
        labels: index of the instruction after each label.
        tables: labels that a ``brx.idx`` may jump to, by the table's name.
        registers: width and number of each, a predicate's width being 1.
        counts: how many registers there are of each width.
    """

    name: str
    parameters: list[tuple[str, int]]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    registers: dict[str, tuple[int, int]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=lambda: {1: 0, 16: 0, 32: 0, 64: 0})

    def declare(self, width: int, name: str) -> None:
        self.registers[name] = (width, self.counts[width])
        self.counts[width] += 1


def parse(ptx: str) -> Kernel:
    """Reads a module of one entry function."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise UnsupportedError("PTX without an entry function that is followed by its body")
    name, parameters, _, body = entry.groups()
    kernel = Kernel(name, [])
    for text in parameters.split(","):
        found = _PARAMETER.search(text)
        if found is None:
            raise UnsupportedError(f"the parameter {text.strip()!r}")
        kernel.parameters.append((found[2], int(found[1]) // 8 * int(found[3] or 1)))
    files = {number: path.rsplit("/", 1)[-1] for number, path in _FILE.findall(ptx)}
    _read_body(kernel, _COMMENT.sub("", body.split("$L__func_end")[0]), files)
    return kernel


def split_operands(text: str) -> list[str]:
    """Splits at commas outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:[^,{\[]|\{[^}]*\}|\[[^\]]*\])+", text) if part.strip()]


def _read_body(kernel: Kernel, body: str, files: dict[str, str]) -> None:
    line, scopes, opened = "", [], 0  # names declared in each open block, which other blocks may use too
    for text in re.split(r";|(?=\n\s*\.loc\s)", body):
        statement = text.strip()
        while statement:
            location, label = _LOCATION.match(statement), _LABEL.match(statement)
            if location:
                line = f"{files.get(location[1], '?')}:{location[2]}"
                statement = statement.split("\n", 1)[1].strip() if "\n" in statement else ""
            elif label and label[1].startswith("$"):
                kernel.labels[label[1]] = len(kernel.instructions)
                statement = statement[label.end() :]
            elif label:
                scopes[-1][label[1]] = f"{label[1]}#{opened}"
                kernel.labels[scopes[-1][label[1]]] = len(kernel.instructions)
                statement = statement[label.end() :]
            elif statement[0] == "{":
                scopes.append({})
                opened += 1
                statement = statement[1:].strip()
            elif statement[0] == "}":
                scopes.pop()
                statement = statement[1:].strip()
            else:
                for names in scopes:
                    for name, own in names.items():
                        statement = re.sub(rf"(?<![%$\w]){name}\b", own, statement)
                _read_statement(kernel, statement, line, scopes, opened)
                break


def _read_statement(kernel: Kernel, statement: str, line: str, scopes: list[dict[str, str]], opened: int) -> None:
    if found := _REGISTERS.match(statement):
        width = 1 if found[1] == "pred" else int(found[1][1:])
        for name in found[2].split(","):
            many = re.match(r"\s*(%\w+)<(\d+)>", name)
            if many:
                for number in range(int(many[2])):
                    kernel.declare(width, f"{many[1]}{number}")
            elif scopes:
                scopes[-1][name.strip()] = f"{name.strip()}#{opened}"
                kernel.declare(width, scopes[-1][name.strip()])
            else:
                kernel.declare(width, name.strip())
    elif statement.startswith(".branchtargets"):
        kernel.tables[list(kernel.labels)[-1]] = split_operands(statement.split(None, 1)[1])
    elif not statement.startswith("."):
        guard = _GUARD.match(statement)
        rest = statement[guard.end() :] if guard else statement
        opcode, *operands = rest.split(None, 1)
        kernel.instructions.append(
            Instruction(
                opcode,
                tuple(split_operands(operands[0])) if operands else (),
                (guard[2], guard[1] == "!") if guard else None,
                line,
            )
        )
    elif not statement.startswith((".loc", ".pragma")):
        raise UnsupportedError(f"the directive {statement!r}")
