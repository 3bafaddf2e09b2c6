"""What a compiled program says of its collectives."""

import re


def all_reduces(compiled):
    """Payload types of the all-reduces, as (in the main program, {branch of a conditional: [...]})."""
    text = compiled.as_text()
    branches = set(re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", text))
    for group in re.findall(r"branch_computations=\{([^}]*)\}", text):
        branches |= {name.strip().lstrip("%") for name in group.split(",")}
    main, rare, here = [], {}, None
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            here = start.group(1)
        if found := re.search(r"= (\(.*?\)|\S+) all-reduce(?:-start)?\(", line):
            (rare.setdefault(here, []) if here in branches else main).append(found.group(1))
    return main, rare


def elements(payload):
    """How many numbers a payload type such as 'f32[2,4]{1,0}' or '(f32[4], f32[4])' holds."""
    total = 0
    for dims in re.findall(r"\w+\[([\d,]*)\]", payload):
        size = 1
        for d in filter(None, dims.split(",")):
            size *= int(d)
        total += size
    return total
