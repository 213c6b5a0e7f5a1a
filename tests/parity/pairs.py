"Reference pairs NAME.json + NAME.safetensors: manifest and tensors that the released code computed"
import json
from pathlib import Path
from types import SimpleNamespace
from safetensors.torch import load_file

HERE = Path(__file__).parent/'reference'


def folders(config): return [HERE, *map(Path, config.getoption('--reference'))]


def load_pair(path):
    "Manifest and tensors of one pair; `sd` is its state dict under published keys"
    t = load_file(path.with_suffix('.safetensors'))
    return SimpleNamespace(name=path.stem, folder=path.parent, manifest=json.loads(path.read_text()), t=t,
                           sd={k[3:]: v for k, v in t.items() if k.startswith('sd/')})


def reference_pairs(config, prefix, accept=lambda name: True):
    "Paths of the pairs whose name begins with `prefix`, in the project's folder and in those given"
    found = [p for d in folders(config) for p in sorted(d.glob(f'{prefix}*.json')) if p.with_suffix('.safetensors').exists()]
    return [p for p in found if accept(p.stem)]


def base_of(pair):
    "The pair that holds the weights and inputs of another: the one that its manifest names"
    said = pair.manifest.get('config', {}).get('state_from', '') + ' ' + pair.manifest['description']
    named = [p for p in pair.folder.glob('*.json') if p.stem in said and p.stem != pair.name and p.with_suffix('.safetensors').exists()]
    named = [b for b in map(load_pair, sorted(named, key=lambda p: -len(p.stem))) if b.sd]
    if not named: raise FileNotFoundError(f'{pair.name} needs a pair with weights in {pair.folder}, named in its manifest')
    return named[0]
