"""Modules import downwards only, and stay small: the table "Rooms" of CONTRIBUTING.md is the rule, read here.

Run as a script, it lists every fault of the tree: `python tests/test_rooms.py`."""
import ast, json, re
from functools import cache
from pathlib import Path
from typing import NamedTuple
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = 'deqdet'
LINES,CELLS,COLUMNS = 320,80,100 # of a module, in a notebook, of a line of code (not a directive) there

class Room(NamedTuple):
    name: str
    modules: list     # names below the package, in reading order; 'ops/' stands for everything in that folder
    holds: str
    imports: list     # names of rooms
    imported_by: list # names of rooms

def cells_of(row): return [c.strip() for c in row.strip().strip('|').split('|')]
def names(text): return re.findall(r'`([^`]+)`', text)

def table(text):
    "The rooms that a markdown table lists, in its order"
    head = '| room | modules | holds | imports | imported by |'
    rows = text[text.index(head):].split('\n\n')[0].splitlines()[2:]
    parts = [cells_of(r) for r in rows]
    return [Room(names(p[0])[0], names(p[1]), p[2], names(p[3]), names(p[4])) for p in parts]

@cache
def rooms(): return table((ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8'))

class Page(NamedTuple):
    "A notebook with a module"
    module: str  # below the package: 'ops.linear'
    number: str  # of the notebook
    file: Path   # the notebook

def source(cell): return ''.join(cell['source'])
def read(file): return json.loads(file.read_text(encoding='utf-8'))['cells']
def code(file): return [source(c) for c in read(file) if c['cell_type']=='code']

def page(file):
    "The module of a notebook, if it has one"
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(code(file)), re.M)
    return Page(found[1], file.name.split('_')[0], file) if found else None

def notebooks(root=ROOT):
    "Every notebook that is a page"
    files = sorted((root/'nbs').rglob('*.ipynb'))
    return [f for f in files if not any(o[0] in '._' for o in f.relative_to(root/'nbs').parts)]

@cache
def pages():
    "Module name -> its page"
    return {p.module:p for p in map(page, notebooks()) if p}

def room_of(module, rooms=rooms):
    "The room that names a module, else the one that names its folder"
    folder = module.rpartition('.')[0].replace('.', '/') + '/'
    named = [r for m in (module, folder) for r in rooms() if m in r.modules]
    return named[0] if named else None

def made_by(name):
    "The modules that an entry of the table stands for"
    return [m for m in pages() if m==name or m.startswith(name[:-1]+'.')]

def place(module):
    "Where a module stands in reading order: its room, its place in the row, its notebook's number"
    room = room_of(module)
    row = room.modules.index(module) if module in room.modules else 0
    return rooms().index(room), row, pages()[module].number

def imported(src, module):
    "Modules of the package that a piece of Python imports; `module` is the one it stands in"
    found = set()
    for t in ast.walk(ast.parse(src)):
        if isinstance(t, ast.Import): found |= {a.name for a in t.names}
        if isinstance(t, ast.ImportFrom):
            base = f'{PACKAGE}.{module}'.split('.')[:-t.level] if t.level else []
            base = '.'.join([*base, t.module] if t.module else base)
            found |= {base} | {f'{base}.{a.name}' for a in t.names}
    below = {n.removeprefix(f'{PACKAGE}.') for n in found if n.startswith(f'{PACKAGE}.')}
    return {n for n in below if n in pages()}

def python(src):
    "A cell's Python: without magics, calls of the shell, and directives"
    return '' if src.lstrip().startswith(('%%','!')) else re.sub(r'^\s*[%!].*$', '', src, flags=re.M)

# ---- the table

def test_every_module_has_a_room():
    lost = [m for m in pages() if room_of(m) is None]
    assert not lost, f'no row of the table in CONTRIBUTING.md has {lost}'
    listed = [m for r in rooms() for m in r.modules]
    assert len(listed)==len(set(listed))
    gone = [m for m in listed if not made_by(m)]
    assert not gone, f'the table names {gone}, which no notebook makes'

def test_rooms_import_rooms_above_them():
    for i,r in enumerate(rooms()):
        above = [o.name for o in rooms()[:i+1]]
        assert set(r.imports) <= set(above), f'{r.name} may not import {set(r.imports)-set(above)}, which stand below it'

def test_both_columns_say_the_same():
    for r in rooms():
        users = [o.name for o in rooms() if r.name in o.imports]
        assert r.imported_by==users, f'{r.name} is imported by {users}, and the table says {r.imported_by}'

def test_modules_are_listed_in_the_order_of_their_numbers():
    for r in rooms():
        numbers = [pages()[m].number for m in r.modules if m in pages()]
        assert numbers==sorted(numbers), r

def test_numbers_are_plain():
    "No 03b: two digits, one notebook for each in its folder, and the name of the module after them"
    seen = set()
    for p in pages().values():
        assert re.fullmatch(r'\d\d', p.number), p.file.name
        assert p.file.stem==f"{p.number}_{p.module.split('.')[-1]}", p
        assert (p.file.parent, p.number) not in seen, p.file
        assert list(p.file.relative_to(ROOT/'nbs').parent.parts)==p.module.split('.')[:-1], p
        seen.add((p.file.parent, p.number))

# ---- faults of a module or notebook, one line each

def upwards(p):
    "Imports of a module that its room does not allow, or of a later notebook of the same room"
    mine = room_of(p.module)
    src = (ROOT/PACKAGE/(p.module.replace('.', '/') + '.py')).read_text(encoding='utf-8')
    for m in sorted(imported(src, p.module)):
        other = room_of(m)
        if other is None or mine is None: continue
        if other.name not in mine.imports + [mine.name]: yield f'{p.module} imports {m}: {mine.name} may not import {other.name}'
        elif place(m) >= place(p.module): yield f'{p.module} imports {m}, which comes later'

def shown_too_early(p):
    "What the cells of a page import from pages that a reader has not met yet"
    for src in code(p.file):
        for m in sorted(imported(python(src), p.module)):
            if room_of(m) and room_of(p.module) and place(m) > place(p.module):
                yield f'{p.file.name} imports {m}, which comes later'

def too_long(p):
    n = len((ROOT/PACKAGE/(p.module.replace('.', '/') + '.py')).read_text(encoding='utf-8').splitlines())
    if n > LINES: yield f'{p.module} has {n} lines, of {LINES}'

def too_many_cells(file):
    n = len(read(file))
    if n > CELLS: yield f'{file.name} has {n} cells, of {CELLS}'

def too_wide(file):
    for src in code(file):
        for l in src.splitlines():
            if len(l) > COLUMNS and not l.startswith('#|'): yield f'{file.name}: {len(l)} columns, of {COLUMNS}: {l.strip()[:60]}'

def is_swap(target, value): return sorted(map(ast.unparse, target.elts))==sorted(map(ast.unparse, value.elts))

def bound_at_once(file):
    "`a,b = 1,2`: several things that one statement names. A swap, and unpacking one thing, are fine"
    for src in code(file):
        for t in ast.walk(ast.parse(python(src))):
            for o in getattr(t, 'targets', []):
                both = isinstance(o, ast.Tuple) and isinstance(getattr(t, 'value', None), ast.Tuple)
                if both and not is_swap(o, t.value): yield f'{file.name} binds at once: {ast.unparse(t)[:60]}'

RULES = [(upwards, lambda: pages().values()), (shown_too_early, lambda: pages().values()), (too_long, lambda: pages().values()),
         (too_many_cells, notebooks), (too_wide, notebooks),
         (bound_at_once, notebooks)]

@pytest.mark.parametrize('rule,things', RULES, ids=[f.__name__ for f,_ in RULES])
def test_rule(rule, things):
    found = [line for o in things() for line in rule(o)]
    assert not found, '\n'.join(found)

# ---- the reader itself

SMALL = """Text

| room | modules | holds | imports | imported by |
|---|---|---|---|---|
| `low` | `low/` | things | | `high` |
| `high` | `a`, `b` | more | `low` | |

More
"""

def test_table_is_read():
    low,high = table(SMALL)
    assert low==Room('low', ['low/'], 'things', [], ['high']) and high==Room('high', ['a','b'], 'more', ['low'], [])
    small = lambda: [low, high]
    assert [room_of(m, small) for m in ('low.x','lower','b','b.c')]==[low, None, high, None]

@pytest.mark.parametrize('src,found', [
    ('from deqdet.boxes import iou', {'boxes'}), ('import deqdet.boxes', {'boxes'}), ('from deqdet import boxes', {'boxes'}),
    ('from ..boxes import iou', {'boxes'}), ('from .optim import f', {'training.optim'}), ('from . import optim', {'training.optim'}),
    ('def f():\n    from deqdet.boxes import iou', {'boxes'}), ('import boxes', set()), ('x = 1', set())])
def test_imports_are_found(src, found): assert imported(src, 'training.of_this_folder')==found

@pytest.mark.parametrize('src,n', [('a,b = 1,2', 1), ('self.a,(b,c) = 1,x', 1), ('a,b = b,a', 0), ('a,b = f()', 0), ('a = b = 1', 0), ('a = 1,2', 0)])
def test_names_bound_at_once_are_found(src, n, tmp_path):
    file = tmp_path/'x.ipynb'
    file.write_text(json.dumps(dict(cells=[dict(cell_type='code', source=src)])))
    assert len(list(bound_at_once(file)))==n

def test_upward_import_is_caught(monkeypatch, tmp_path):
    "A module of the paper that imports the command line, written into a copy"
    import shutil
    shutil.copytree(ROOT/PACKAGE, tmp_path/PACKAGE)
    with (tmp_path/PACKAGE/'boxes.py').open('a') as f: f.write('\nfrom .cli import fill\n')
    boxes = pages()['boxes']
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    assert 'boxes imports cli: boxes may not import' in '\n'.join(upwards(boxes))

if __name__=='__main__':
    for rule,things in RULES:
        found = [line for o in things() for line in rule(o)]
        print(f'---- {rule.__name__}: {len(found)}', *found, sep='\n')
