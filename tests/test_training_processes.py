"How batches are dealt, in one process"
import torch
from deqdet.data import det_dls, synth_coco
from deqdet.training.processes import Shards, deal, shard

def test_batches_are_dealt_in_turn():
    assert [deal(range(10), 2, r, 3) for r in range(3)]==[[0,1,6,7], [2,3,8,9], [4,5,0,1]]
    assert [deal(range(5), 2, r, 2) for r in range(2)]==[[0,1,4], [2,3,0,1]]

def test_a_short_batch_may_be_left_out():
    assert [deal(range(5), 2, r, 2, drop_last=True) for r in range(2)]==[[0,1], [2,3]]

def test_more_processes_than_batches():
    assert [deal(range(2), 2, r, 3) for r in range(3)]==[[0,1]]*3

def test_shards_are_the_loader_dealt(tmp_path):
    path = synth_coco(tmp_path/'shapes', n_train=8, n_valid=2, size=64, seed=1)
    dl = det_dls(path, bs=2, num_workers=0, device='cpu').train
    parts = [shard(dl, r, 2) for r in range(2)]
    assert [len(p) for p in parts]==[2, 2]
    ids = [[t.image_id.tolist() for _,_,t in p] for p in parts]
    assert [i for pair in zip(*ids) for i in pair]==[t.image_id.tolist() for _,_,t in dl]
    parts[0].set_epoch(0, 2) # begin after two images
    assert [t.image_id.tolist() for _,_,t in parts[0]]==ids[0][1:]

def test_shards_use_the_accelerator_that_pytorch_reports(monkeypatch):
    given = []
    import fastai.distributed
    monkeypatch.setattr(fastai.distributed, 'Accelerator', lambda **kwargs: given.append(kwargs))
    for there in (True, False):
        monkeypatch.setattr(torch.accelerator, 'is_available', lambda: there)
        Shards()
    Shards(cpu=False)
    assert given==[dict(cpu=False), dict(cpu=True), dict(cpu=False)]
