"Two results of the same benchmark side by side: `python benchmarks/compare.py A.json B.json`"
import json, sys
from pathlib import Path


def numbers(tree, at=()):
    "(path, number) for every number in a result"
    if isinstance(tree, dict):
        for k, v in tree.items(): yield from numbers(v, (*at, str(k)))
    elif isinstance(tree, list):
        for i, v in enumerate(tree): yield from numbers(v, (*at, str(i)))
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool): yield at, tree


def main():
    if len(sys.argv) != 3: raise SystemExit(__doc__)
    a, b = (json.loads(Path(p).read_text()) for p in sys.argv[1:])
    for name, r in zip(sys.argv[1:], (a, b)):
        print(f"{name}: {r['commit'][:9]}, {r['machine']['cpu']}, {r['machine']['threads']} threads, torch {r['machine']['torch']}")
    old, new = (dict(numbers(r['result'])) for r in (a, b))
    for k in old:
        if k in new and old[k]: print(f"{' / '.join(k):70} {old[k]:12.5g} {new[k]:12.5g} {new[k]/old[k]:7.3f}")
    for k in old.keys() ^ new.keys(): print(f"{' / '.join(k):70} only in {sys.argv[1 if k in old else 2]}")


if __name__ == '__main__': main()
