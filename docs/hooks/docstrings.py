"""Our docstrings as mkdocstrings reads them: columns of names become sections, comments behind fields docstrings."""

import re

import griffe

COLUMN = re.compile(r"(\w+(?:, \w+)*)(\s*)(.*)")


class Columns(griffe.Extension):
    def on_function(self, *, func, **kwargs):
        names = {parameter.name for parameter in func.parameters if parameter.name not in ("self", "cls")}
        _rewrite(func, "Args", names)

    def on_class(self, *, cls, **kwargs):
        fields = {name for name, member in cls.members.items() if member.is_attribute}
        _rewrite(cls, "Attributes", fields)
        for name in fields:
            _comment(cls.members[name])


def _rewrite(thing, section, names):
    """`policy   which tokens stay` and the indented lines after it, as Google's style has them."""
    if not thing.docstring:
        return
    prose, given, place, is_open = [], [], None, False  # place: the column in which descriptions stand
    for line in thing.docstring.value.splitlines():
        match = COLUMN.match(line)
        several = match[1].split(", ") if match else []
        if match and set(several) <= names and (len(match[2]) > 1 or not match[3] or match.start(3) == place):
            place = match.start(3) if match[3] else place
            given.append((several, [match[3]]))
            is_open = True
        elif is_open and line.startswith("  "):
            given[-1][1].append(line.strip())
        else:
            is_open = False
            prose.append(line)
    rows = [f"    {name}: {' '.join(words).strip()}" for several, words in given for name in several]
    if rows:
        thing.docstring.value = "\n".join([*prose, "", f"{section}:", *rows]).strip()


def _comment(field):
    """`rows: int = 0  # sequences decoded together`"""
    if field.docstring or not field.lineno:
        return
    _, mark, words = field.lines_collection[field.filepath][field.lineno - 1].partition("  # ")
    if mark:
        field.docstring = griffe.Docstring(words[0].upper() + words[1:] + ".", parent=field)
