"""Make a run of weights that Caffe or ONNX distributes.

python -m alexnet_repro.convert source=bvlc_alexnet.caffemodel mean=imagenet_mean.binaryproto run=runs/bvlc_alexnet
"""

from alexnet_repro.cli import command

if __name__ == "__main__":
    command("convert")
