"The trained start that comes with the package: what of it a detector takes, and what the rest begins with"
import json, math
from dataclasses import replace
from functools import cache
import pytest, torch
from safetensors.torch import load_file, save_file
from deqdet.decoder import Stacked
from deqdet.families.start import Started, load_start, nearest_contents, object_row, start_file, start_note
from deqdet.sets.scenes import KIND_NAMES
from deqdet.zoo import create_detector, deqdet_lite, published, zoo

FILE = start_file('deqdet_lite')
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f'{FILE} is not here')
BARE = replace(deqdet_lite, body='', channels=(24,40,112,320)) # all but the body
CONTENTS = 'queries.content.weight'

@cache
def saved(): return {k: v.float() for k,v in load_file(FILE).items()}

def make(hyper=BARE, vocab=None, **kwargs):
    "A detector before and after: its fresh weights, itself, and what `load_start` says"
    torch.manual_seed(0)
    model = replace(hyper, n_classes=len(vocab) if vocab else 3, **kwargs).build(vocab=vocab)
    fresh = {k: v.clone() for k,v in model.state_dict().items()}
    return fresh, model, load_start(model, FILE)

def same(a, b): return torch.equal(a.float(), b.float())

# ---- the file

def test_the_file_is_small_and_half_precision():
    assert FILE.stat().st_size < 12e6
    assert {v.dtype for v in load_file(FILE).values() if v.is_floating_point()}=={torch.float16}
    assert not any('.body.' in k for k in saved())
    assert all(v.isfinite().all() for v in saved().values())

def test_the_file_says_what_it_is():
    note = start_note(FILE)
    assert (note['name'], note['vocab'])==('deqdet_lite', KIND_NAMES)
    assert int(note['scenes']) > 0 and int(note['updates']) > 0 and note['commit']

@pytest.mark.parametrize('name', [k for k,v in zoo.items() if v.start])
def test_every_start_that_the_zoo_names_is_there(name): assert start_file(published(name).start).exists()

# ---- the same classes

def test_all_shapes_are_kept_with_the_same_classes():
    _,model,done = make(vocab=KIND_NAMES)
    assert isinstance(done, Started) and done.fresh==[]
    own = {k: v for k,v in model.state_dict().items() if '.body.' not in k}
    assert set(done.kept)==set(own)
    for k,v in own.items():
        if k!='queries.boxes': assert same(v, saved()[k]), k

def test_half_precision_goes_round_bit_for_bit(tmp_path):
    "What was loaded, saved and loaded again is the same"
    _,model,_ = make(vocab=KIND_NAMES)
    half = {k: v.half().contiguous() for k,v in model.state_dict().items() if v.is_floating_point()}
    objects = {k: v for k,v in load_file(FILE).items() if '.object.' in k}
    note = start_note(FILE)
    file = tmp_path/'again.safetensors'
    save_file(half | objects, file, note | dict(vocab=json.dumps(note['vocab'])))
    torch.manual_seed(1)
    again = replace(BARE, n_classes=60).build(vocab=KIND_NAMES)
    assert load_start(again, file).fresh==[]
    for a,b in zip(again.state_dict().values(), model.state_dict().values(), strict=True): assert same(a, b)

def test_the_body_is_untouched():
    torch.manual_seed(0)
    model = create_detector('deqdet_lite', vocab=KIND_NAMES)
    body = {k: v.clone() for k,v in model.pyramid.body.state_dict().items()}
    done = load_start(model, FILE)
    assert body and all(torch.equal(v, body[k]) for k,v in model.pyramid.body.state_dict().items())
    assert done.fresh==[] and not any('.body.' in k for k in done.kept)

# ---- other classes

def check_object_rows(fresh, model, towers):
    for tower,old in towers.items():
        row,bias = (saved()[f'{old}.object.{k}'] for k in ('weight', 'bias'))
        last = model.state_dict()[f'{tower}.3.weight'] # (K,D)
        torch.testing.assert_close(last, .1*fresh[f'{tower}.3.weight'] + row)
        assert len(last.unique(dim=0))==len(last) # classes can part
        biases = model.state_dict()[f'{tower}.3.bias']
        torch.testing.assert_close(biases, torch.full_like(biases, bias.item() - math.log(len(last))))

@pytest.mark.parametrize('vocab', [['cat'], ['cat', 'dog', 'owl'], KIND_NAMES[::-1]], ids=['one', 'three', 'as many'])
def test_other_classes_begin_with_the_object_row(vocab):
    "As many classes with other names, too: a name says what a row means"
    fresh,model,done = make(vocab=vocab)
    towers = {f'decoder.{k}.cls': f'decoder.{k}.cls' for k in ('init', 'step')}
    assert sorted(done.fresh)==sorted(f'{k}.3.{w}' for k in towers for w in ('weight', 'bias'))
    check_object_rows(fresh, model, towers)

def test_without_names_no_class_is_kept():
    fresh,model,done = make(BARE)
    assert model.vocab is None and len(done.fresh)==4
    torch.manual_seed(0)
    nameless = replace(BARE, n_classes=60).build()
    assert len(load_start(nameless, FILE).fresh)==4

def test_the_object_row_is_the_nearest_linear_function_to_the_highest_logit():
    torch.manual_seed(0)
    x = torch.randn(500, 8)
    truth = torch.linspace(-1, 1, 8)
    weight,bias = object_row(x, torch.stack([x @ truth - 2, x @ truth - 5], -1))
    torch.testing.assert_close(weight, truth, atol=1e-3, rtol=0)
    assert bias.item()==pytest.approx(-2, abs=1e-3)

def test_objects_count_more_than_background():
    "Where no line fits all, it fits high logits"
    x = torch.linspace(-2, 2, 401)[:, None]
    bent = x.clamp(min=0)*4 - 2 # (n,1)
    weight,bias = object_row(x, bent)
    line = x*weight + bias
    error = (line - bent).abs().flatten()
    plain = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x)], 1), bent).solution
    other = (x*plain[0] + plain[1] - bent).abs().flatten()
    high = bent.flatten() > 1
    assert error[high].mean() < .7*other[high].mean()

# ---- other queries

def test_another_grid_takes_the_nearest_contents():
    _,model,done = make(n_queries=48, grid=(6,8,.2))
    old,new = saved()['queries.boxes'], model.state_dict()['queries.boxes']
    assert len(new)==48 and CONTENTS in done.kept
    contents = model.state_dict()[CONTENTS]
    for box,content in zip(new, contents): # one at a time, by hand
        nearest = ((old[:, 0] - box[0])**2 + (old[:, 1] - box[1])**2).argmin()
        assert torch.equal(content, saved()[CONTENTS][nearest])
    assert len(contents.unique(dim=0)) > 40
    own = replace(BARE, n_classes=3, n_queries=48, grid=(6,8,.2)).build().state_dict()['queries.boxes']
    assert torch.equal(new, own) # boxes are its own

def test_the_nearest_is_by_centre_not_by_size():
    old = torch.tensor([[.2,.5,.3,.3], [.5,.5,.9,.9], [.8,.5,.3,.3]])
    new = torch.tensor([[.1,.4,.9,.9], [.75,.5,.9,.9], [.5,.1,.1,.1]])
    assert nearest_contents(torch.arange(3.)[:, None], old, new).flatten().tolist()==[0., 2., 1.]

# ---- another decoder

def test_a_stack_begins_as_the_equilibrium():
    "g in its first stage, f in all others"
    fresh,model,done = make(strategy=Stacked(6))
    own = model.state_dict()
    for i in range(6):
        old = 'decoder.step.' if i else 'decoder.init.'
        names = [k for k in saved() if k.startswith(old) and '.object.' not in k and '.cls.3.' not in k]
        assert names
        for k in names: assert same(own[k.replace(old, f'decoder.steps.{i}.')], saved()[k]), k
    assert len(done.fresh)==12 and all('.cls.3.' in k for k in done.fresh)
    towers = {f'decoder.steps.{i}.cls': 'decoder.step.cls' if i else 'decoder.init.cls' for i in range(6)}
    check_object_rows(fresh, model, towers)

@torch.no_grad()
def test_a_stack_answers_as_the_equilibrium_does():
    def answer(strategy, images, **kwargs):
        _,model,_ = make(vocab=KIND_NAMES, strategy=strategy)
        return model.eval()([images[s] for s in range(4)], torch.tensor([[64, 64]]), **kwargs)[-1]
    torch.manual_seed(2)
    feats = [torch.randn(1, c, 64//s, 64//s) for c,s in zip(BARE.channels, (4, 8, 16, 32))]
    stack = answer(Stacked(6), feats)
    equilibrium = answer(BARE.strategy, feats, steps=4) # and the extra one of inference
    torch.testing.assert_close(stack.logits, equilibrium.logits, atol=1e-3, rtol=1e-3)

def test_a_detector_of_another_width_keeps_what_does_not_depend_on_it():
    fresh,model,done = make(width=64, heads=4)
    assert done.kept and done.fresh
    own = model.state_dict()
    for k in done.fresh: assert torch.equal(own[k], fresh[k]), k
    for k in done.kept:
        if not k.startswith('queries.'): assert same(own[k], saved()[k]), k

# ---- when it is loaded

def test_a_start_comes_with_a_trained_body_only(monkeypatch):
    called = []
    monkeypatch.setattr('deqdet.zoo.load_start', lambda model, file: called.append(file))
    build = type(deqdet_lite).build
    monkeypatch.setattr(type(deqdet_lite), 'build', lambda self, pretrained=False, vocab=None: build(BARE, False, vocab))
    for kwargs in (dict(), dict(pretrained=True, start=False)): create_detector('deqdet_lite', **kwargs)
    assert called==[]
    create_detector('deqdet_tiny', pretrained=True)
    assert called==[]
    create_detector('deqdet_lite', pretrained=True)
    create_detector('adamixer_lite', pretrained='body.pt')
    assert called==[FILE, FILE]
