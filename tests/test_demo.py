"The demo: everything runs and is written, and its page says what was measured"
import json, re
from html.parser import HTMLParser
import pytest
from PIL import Image
from deqdet import demo
from deqdet.data import synth_coco

@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    path = tmp_path_factory.mktemp('demo')/'shapes'
    synth_coco(path, n_train=8, n_valid=4, size=64, seed=1)
    return path


def test_demo(tmp_path, capsys):
    "Everything runs and is written; so little is trained that no number means anything"
    demo.deqdet_demo(out=str(tmp_path/'demo'), quick=True)
    page, m = (tmp_path/'demo/index.html').read_text(), json.loads((tmp_path/'demo/metrics.json').read_text())
    for o in re.findall('src="([^"]+)"', page): assert (tmp_path/'demo'/o).stat().st_size, o
    assert {'machine', 'seconds', 'steps', 'numbers', 'classes', 'curve', 'first', 'minutes'} <= m.keys()
    assert [r['steps'] for r in m['steps']] == [0, 1, 2, 4] and m['films'] == 3
    with Image.open(tmp_path/'demo/refinement1.gif') as film: assert film.n_frames > 8
    out = capsys.readouterr().out
    assert '0.50:0.95' in out and out.index('first.png') < out.index('drawing') and 'measuring 4 of 4' in out


def test_a_set_of_ones_own(shapes, tmp_path):
    "Nothing is drawn; the size is the detector's"
    assert demo.demo_options(tmp_path, str(shapes), 9, 9, 3) == dict(data=str(shapes), seed=3)
    assert not list(tmp_path.iterdir())


def test_scenes_are_new_and_the_same_on_every_machine():
    a, b = demo.new_scenes(2, 64), demo.new_scenes(2, 64)
    assert all((x == y).all() for x, y in zip(a, b)) and (a[0] != a[1]).any() and a[0].shape == (64, 64, 3)


def measured(**change):
    "What `metrics.json` holds, invented"
    numbers = dict(AP=.5, AP50=.75, AP75=.5, APs=.4, APm=None)
    on = dict(deqdet='0.0.1', commit='abc', torch='2.14', cpu='a <cpu> & more', threads=1, cores=2)
    return dict(numbers=numbers, classes=dict(disc=numbers), steps=[dict(steps=4, seconds=.01, **numbers)], films=2,
                machine=on, parameters=1.6e6, seconds=540, pictures_seen=20000, n_train=4000, n_valid=500, queries=12,
                trained_steps=4, out='a <folder>', data='some <data>', minutes=4.,
                first=dict(objects=9, scenes=3, seconds=8.5)) | change


class Tags(HTMLParser):
    "Every tag that is opened is closed, in order"
    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.text = [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ('img', 'meta', 'br'): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text.append(data)


def test_page_is_whole():
    "Nothing is left of the template, what users name is escaped, every image has words, as many films as there are"
    page = demo.demo_page(measured())
    tags = Tags(page)
    images = [a for k, a in tags.seen if k == 'img']
    assert not tags.open and '$' not in page
    assert all(o['alt'] for o in images) and sum(o['src'].endswith('.gif') for o in images) == 2
    text = ' '.join(' '.join(tags.text).split())
    said = 'a <cpu> & more', 'a <folder>/run', '0.500', '20,000', '1.6 million', '9 min', 'at abc', 'some <data>', 'in 4 minutes', '9 objects'
    for o in said: assert o in text, o


def test_page_without_a_commit_or_a_number():
    "An installed package has no commit; a class that is not in the set has no AP"
    m = measured(numbers=dict(AP=None, AP50=None, AP75=None, APs=None, APm=None))
    m['machine']['commit'] = None
    page = demo.demo_page(m)
    assert 'no commit' in page and '<b>0.000</b>AP</li>' in page and '<td>–</td>' in page


def test_table_rounds_and_escapes():
    assert demo.html_table([dict(a=1, b=.25), dict(a='<', b=None)]) == (
        '<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>0.250</td></tr>'
        '<tr><td>&lt;</td><td>–</td></tr></table>')
