"How a detector is fed, kept and read again"
import json, subprocess, sys
from dataclasses import asdict
import pytest, torch
from torch import nn
from deqdet.decoder import Stacked
from deqdet.model import Detector, Feed, evaluating, from_dict, to_dict
from deqdet.zoo import deqdet_tiny, deformable_tiny, sparse_rcnn_tiny


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return deqdet_tiny.build(vocab=['disc']*80).eval()


# ------------------------------------------------------------------------------------------------------------ feed

@pytest.mark.parametrize('text, feed', [('128', Feed(128, 128)), (640, Feed(640, 640)), ('800x1333', Feed(800, 1333)),
                                        ('1333x800', Feed(800, 1333))])
def test_feed_is_read_from_text(text, feed): assert Feed.parse(text) == feed


@pytest.mark.parametrize('text', ['', '0', '0x5', '5x0', 'big', '1x2x3', '-5', '12.5', '8 x 9', None])
def test_feed_refuses_other_text(text):
    with pytest.raises(ValueError, match='pixels of the long side were expected, as 640, or of both, as 800x1333'): Feed.parse(text)


def test_a_folder_says_how_its_detector_is_fed(model, tmp_path):
    model.feed = Feed(96, 128)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path/'config.json').read_text())['feed'] == dict(short=96, long=128)
    assert Detector.from_pretrained(tmp_path).feed == Feed(96, 128)


def test_a_detector_without_a_feed_stays_without(model, tmp_path):
    model.feed = None
    model.save_pretrained(tmp_path)
    assert Detector.from_pretrained(tmp_path).feed is None


def test_an_older_folder_has_its_feed_in_a_file(model, tmp_path):
    model.feed = None
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path/'config.json').read_text())
    del config['feed'], config['recipe'] # which older folders did not have
    (tmp_path/'config.json').write_text(json.dumps(config))
    assert Detector.from_pretrained(tmp_path).feed is None
    (tmp_path/'feed.json').write_text(json.dumps(asdict(Feed(48, 64))))
    assert Detector.from_pretrained(tmp_path).feed == Feed(48, 64)
    (tmp_path/'feed.json').write_text('{"width": 3}')
    with pytest.raises(TypeError, match='width'): Detector.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------------- records

@pytest.mark.parametrize('hyper, old', [(sparse_rcnn_tiny, 'deqdet.sparse_rcnn.SparseRCNN'),
                                        (deformable_tiny, 'deqdet.deformable.DeformableDETR'),
                                        (deqdet_tiny, 'deqdet.model.AdaMixer')])
def test_records_that_moved_are_found_by_their_old_name(hyper, old):
    now = to_dict(hyper)
    assert from_dict(now | {'is': old}) == hyper == from_dict(json.loads(json.dumps(now)))


@pytest.mark.parametrize('name', ['os.system', 'deqdet.model.json', 'deqdet.model.Nothing', 'builtins.dict', 'Feed'])
def test_nothing_but_a_record_of_deqdet_is_made(name):
    with pytest.raises(ValueError, match=f"'{name}' is no record of deqdet"): from_dict({'is': name})


# ------------------------------------------------------------------------------------------------------------ mode

@pytest.mark.parametrize('mode', [True, False])
def test_evaluating_restores_the_mode(mode):
    net = nn.Sequential(nn.Dropout()).train(mode)
    with evaluating(net) as inside:
        assert inside is net and not net.training and not net[0].training and not torch.is_grad_enabled()
    assert net.training == net[0].training == mode and torch.is_grad_enabled()
    with pytest.raises(KeyError):
        with evaluating(net): raise KeyError
    assert net.training == mode
