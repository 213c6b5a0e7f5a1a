"""An exported detector on a CPU: AP and time of PyTorch, and of onnxruntime in float and in int8

`python benchmarks/int8.py DETECTOR DATA` takes a folder of a training and a detection set. int8 is made by onnxruntime's quantiser: `dynamic` keeps
weights of products in 8 bits and measures activations as they come; `static` also does convolutions, with ranges from some images to train on.
Times are of the processor, for one image at a time from the fed image to boxes, in turns in one run."""
import argparse, logging, shutil, tempfile, time
from pathlib import Path
import torch
from deqdet.evaluate import coco_ap, predict_dl
from deqdet.export import load_exported, to_int8
from deqdet.predict import eval_loader, load_detector
from common import alternate, report


class Fed:
    "Batches for the calibration of ranges"
    def __init__(self, dl, n): self.batches = (dict(images=x.numpy(), sizes=s.numpy()) for (x, s, _), _ in zip(dl, range(n)))
    def get_next(self): return next(self.batches, None)


def quantised(file, dl, n, kinds):
    "The files of a detector in int8, by name"
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    CalibrationDataReader.register(Fed)
    ready, out = file.with_suffix('.ready.onnx'), {}
    quant_pre_process(file, ready, skip_symbolic_shape=True)
    for kind, ops in kinds.items():
        out[kind] = file.with_suffix(f'.{kind}.onnx')
        if kind == 'dynamic': to_int8(shutil.copyfile(file, out[kind]))
        else: quantize_static(ready, out[kind], Fed(dl, n), quant_format=QuantFormat.QDQ, op_types_to_quantize=ops, per_channel=True)
    return out


def ap(model, dl, **kwargs):
    "AP on the whole set"
    with torch.no_grad(): r = coco_ap(predict_dl(model, dl, **kwargs), dl.dataset)
    return dict(AP=r.AP, AP50=r.AP50)


def ms(ways, dl, n, rounds, steps):
    "Processor milliseconds for an image, and over those of PyTorch, measured in turns on `n` images"
    batches = [b for b, _ in zip(dl, range(n))]
    def look(m, **kwargs): return lambda: [m.predict(x, s, orig=t.orig, **kwargs) for x, s, t in batches]
    fns = {k: look(m, **(dict(steps=steps) if k == 'PyTorch' else {})) for k, m in ways.items()}
    with torch.no_grad(): times = alternate(fns, rounds, clock=time.process_time)
    return {k: dict(ms=1000*v['median']/n, over_pytorch=v['ratio']) for k, v in times.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('model'); p.add_argument('data')
    p.add_argument('--size'); p.add_argument('--steps', type=int); p.add_argument('--calibrate', type=int, default=32)
    p.add_argument('--onnx', help='a file that was exported before; exporting many steps takes minutes')
    p.add_argument('--images', type=int, default=16); p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int, default=1); p.add_argument('--out')
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    model = load_detector(args.model, args.size, 'cpu')
    valid, train = (eval_loader(args.data, model, o, bs=1) for o in ('valid', 'train'))
    with tempfile.TemporaryDirectory() as d:
        file = Path(d)/'float.onnx'
        if args.onnx: shutil.copyfile(args.onnx, file)
        else: model.export(file, steps=args.steps)
        files = {'onnxruntime': file} | quantised(file, train, args.calibrate, dict(dynamic=['MatMul', 'Gemm'], convolutions=['Conv'], static=['Conv', 'MatMul', 'Gemm']))
        ways = {'PyTorch': model} | {k: load_exported(f) for k, f in files.items()}
        size = {k: round(f.stat().st_size/1e6, 1) for k, f in files.items()}
        rows = ms(ways, valid, args.images, args.rounds, args.steps)
        for k, m in ways.items():
            m.feed = model.feed
            rows[k] |= ap(m, valid, **(dict(steps=args.steps) if k == 'PyTorch' else {})) | dict(MB=size.get(k))
            print(k, rows[k], flush=True)
    report(rows, args.out, images=len(valid.dataset), size=str(model.feed), steps=args.steps, threads=args.threads)


if __name__ == '__main__': main()
