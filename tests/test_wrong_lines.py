"""Test wrong command lines: each ends with status 2 and at most three lines, before any work, and leaves nothing behind."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

# A command line per line, then > and a part of the message.
LINES = """
train epochs=0 > at least 1
train epochs=-3 > at least 1
train epochs=1.5 > whole number
train epochs=many > whole number
train epochs=null > whole number
train epochs=true > whole number
train epochs=[1,2] > whole number
train epochs=1e9999 > epochs
train batch_size=0 > at least 1
train batch_size=-8 > at least 1
train batch_size=16.0 > whole number
train batch_size=100000 > has only
train seed=-1 > at least 0
train seed=4294967296 > below
train seed=1.5 > whole number
train seed=abc > whole number
train seed=true > whole number
train stop_at=abc > a number
train claim=foo > there is no claim=foo
train stop_at=-1 > at least 0
train stop_at=100 > below 100
train stop_at=nan > finite
train keep_epochs=3 > a list
train keep_epochs=[0] > at least 1
train keep_epochs=[a] > whole number
train keep_epochs=[500] > this run has
train resume=yes_please > true or false
train resume=2 > true or false
train order=random > one of reshuffled, fixed, stored
train claim=[] > a word
train recipe=papper > did you mean paper?
train recipe=cuda_convnet > net=locally_connected
train optim.lr=0 > above 0
train optim.lr=-0.01 > above 0
train optim.lr=nan > finite
train optim.lr=inf > finite
train optim.lr=null > a number
train optim.lr=fast > a number
train optim.lr=true > a number
train optim.momentum=2 > below 1
train optim.momentum=-0.1 > at least 0
train optim.momentum=1 > below 1
train optim.momentum=null > a number
train optim.weight_decay=-1 > at least 0
train optim.weight_decay=nan > finite
train optim.bias_rate=-2 > at least 0
train optim.bias_decay=maybe > true or false
train optim.bias_decay=true optim.weight_decay=0 > no effect with optim.weight_decay=0
train optim.learning_rate=1 > there is no option 'optim.learning_rate'
train optim.lrr=1 > did you mean optim.lr?
train optim=1 > optim
train augment.share=0 > at least 1
train augment.share=-1 > at least 1
train augment.share=1.5 > whole number
train augment.jitter=-3 > at least 0
train augment.jitter=2 > at most 1
train augment.colour_noise=-1 > at least 0
train augment.colour_noise=inf > finite
train augment.colour_noise_epochs=abc > whole number
train augment.colour_noise_epochs=-1 > at least 0
train augment.colour_divisor=0 > above 0
train augment.colour_divisor=-1 > above 0
train augment.colour_unit=variance > one of eigenvalue, deviation
train augment.colour_unit=deviation augment.colour_noise=0 > no effect with augment.colour_noise=0
train augment.share=4 augment.random_crops=false augment.mirror=false > no effect with augment.random_crops=false
train augment.crop=0 > at least 1
train augment.crop=-224 > at least 1
train augment.crop=300 > the images are 256x256
train augment.crop=10 > nothing is left
train net.image_size=200 > takes patches of another size
train net.width=0.3 > a multiple of 1/16
train net.width=0 > above 0
train scale=half > there are: full, proxy
train scale=proxy data=imagenette > source=PATH data.image_size=110 data.store=stores/imagenette-110
train augment.mean=none > one of patch, centre
train augment.mirror=left > true or false
train augment.random_crops=9 > true or false
train augment.crops=224 > did you mean augment.crop?
train schedule=run_148 data=imagenette > there is no store
train +ablation=no_lrn +ablation=tanh > '+ablation=[no_lrn,tanh]'
train +experiment=figure_1 +experiment=ablations > choose one
train learning_rate=0.1 > did you mean optim.lr?
train data=cifar10 > prepare data=cifar10
train schedule.rule=cosine > one of when_error_stalls, by_hand, constant
train schedule.when_error_stalls.factor=0 schedule.rule=when_error_stalls > above 1
train schedule.when_error_stalls.factor=1 schedule.rule=when_error_stalls > above 1
train schedule.when_error_stalls.patience=0 schedule.rule=when_error_stalls > at least 1
train schedule.when_error_stalls.times=-1 schedule.rule=when_error_stalls > at least 0
train schedule.when_error_stalls.threshold=-1 schedule.rule=when_error_stalls > at least 0
train schedule.when_error_stalls.factor=5 > no effect with schedule.rule=by_hand
train schedule.when_error_stalls.patience=3 schedule.rule=constant > no effect with schedule.rule=constant
train schedule.by_hand.of_epochs=9 schedule.rule=when_error_stalls > no effect with schedule.rule=when_error_stalls
train schedule.by_hand.of_epochs=0 > at least 1
train schedule.by_hand.of_epochs=-1 > at least 1
train schedule.by_hand.val_joins_after=-1 > at least 0
train schedule.by_hand.changes=3 > schedule.by_hand.changes
train schedule.by_hand.changes.weights.4=-1 > conf/schedule
train schedule.by_hand.changes.conv9.4=1 > schedule.by_hand.changes
train schedule=run_148 > is not in effect: data=photos
train schedule=run_148 recipe=as_run data=ilsvrc2012 > there is no store
train schedule=run_148 recipe=as_run data=ilsvrc2012 schedule.by_hand.of_epochs=90 > there is no store
train schedule=run_148 schedule.rule=constant > no effect with schedule.rule=constant
train schedule=run_999 > there are:
train +ablation=no_lrn,tanh > '+ablation=[no_lrn,tanh]'
train ablation=no_lrn > did you mean +ablation=no_lrn?
train model=alexnet > did you mean net=NAME?
train dataset=photos > did you mean data=NAME?
train trainer.max_epochs=1 > set epochs=N
train max_epochs=1 > did you mean epochs?
train +trainer.max_time=1 dry_run=maybe > true or false
train +ablation=[no_lrn, > has no closing bracket
train -m seed=0,1,x > seed=x: this must be a whole number
train -m seed=interval(0,1) > give the values themselves
train -m epochs=1,2 run=one > is also the folder of job 0
train net=vgg > there are: alexnet
train net=four_layer > net=four_layer has no option net.init
train net=four_layer recipe=cuda_convnet net.dropout=0.5 > there is no option 'net.dropout'
train net.name=resnet > one of alexnet, four_layer, locally_connected
train net.lrn=5 > true or false
train net.lrn_n=4 > must be odd
train net.lrn_n=0 > at least 1
train net.lrn_n=5.5 > whole number
train net.lrn_k=-1 > above 0
train net.lrn_alpha=-1 > at least 0
train net.lrn_beta=nan > finite
train net.lrn=false net.lrn_alpha=1 > no effect with net.lrn=false
train net.lrn=false net.lrn_n=3 > no effect with net.lrn=false
train net.lrn=false net.layer1_order=norm_pool_relu > no effect with net.lrn=false
train net.dropout=1 > below 1
train net.dropout=2 > below 1
train net.dropout=-0.5 > at least 0
train net.dropout=half > a number
train net.activation=gelu > one of relu, tanh
train net.pooling=average > one of overlapping, non_overlapping
train net.init=xavier > one of paper, as_run
train net.towers=3 > at most 2
train net.towers=2.0 > whole number
train net.bias_init=one > a number
train net.bias_init=inf > finite
train net.conv3=no_thanks > true or false
train net.conv9=true > there is no option 'net.conv9'
train net.lrn_across_towers=3 > true or false
train net.pool_first=maybe > true or false
train net.lrn=false net.pool_first=true > no effect with net.lrn=false
train recipe=as_run net.pool_first=true > needs net.layer1_order=relu_norm_pool
train net.lrn_across_towers=true placement=two_devices > needs the maps of both towers
train net.floor_pools=[pool3] > one of pool1, pool2, pool5
train net.floor_pools=pool1 > a list
train net.layer1_order=pool_first > one of relu_norm_pool, norm_pool_relu
train trainer=tpu > there are: auto, cpu, gpu
train trainer=gpu > error: trainer
train trainer.accelerator=tpu > one of auto, cpu, gpu
train trainer.precision=16-mixed trainer=cpu > needs a GPU
train trainer.precision=7 > one of auto, 32-true
train trainer.precision=32 > one of auto, 32-true
train trainer.precision=fp32 > one of auto, 32-true
train trainer.tf32=1 > true or false
train trainer.tf32=true trainer=cpu > is for GPUs
train trainer.compile=yes > one of off, default, graphs
train trainer.compile=graphs trainer=cpu > is for GPUs
train trainer.compile=default placement=two_devices > no effect
evaluate run=a trainer.compile=default > has no effect on evaluate
train trainer.workers=-1 > at least 0
train trainer.workers=1.5 > whole number
train trainer.workers=all > whole number
train trainer.devices=0 > at least 1
train trainer.devices=3 placement=two_devices > needs 2 devices
train trainer.nodes=0 > at least 1
train trainer.nodes=2 > can't be shared evenly
train trainer.checkpoint_minutes=0 > above 0
train trainer.checkpoint_minutes=soon > a number
train trainer.keep_memory=1 > true or false
train placement=three_devices > there are: one_device, two_devices
train placement.replicas=0 > at least 1
train placement.replicas=half > whole number
train placement.devices=4 > at most 2
train placement=two_devices +ablation=one_gpu > has no second tower
train placement=two_devices trainer.precision=16-mixed > loss scaling
train logger=wandb logger.mode=loud > one of auto, online, offline, disabled
train logger.project=mine > there is no option 'logger.project'
train watch.every=1.5 > whole number
train watch.every=-1 > at least 0
train watch.plateau_steps=0 > at least 1
train data=imagenet > there are:
train data=imagenette > prepare data=imagenette source=PATH
train data.store=/proc/nope > /proc/nope
train data.image_size=0 > at least 1
train data.image_size=32 > the images are 32x32
train data.train_per_class=0 > at least 1
train data.val_per_class=0 > at least 1
train data.source=internet > one of embedded, yours, cifar10
train data=imagenette data.hold_out_every=5 > has no effect on train
train data=imagenet_fall2009 data.hold_out_seed=5 > has no effect on train
train data=cifar10 data.images_per_file=5000 recipe=paper > no effect with order=reshuffled
train run=/proc/nope/run > cannot be written
train run= > run
train +ablation=no_lnr > did you mean no_lrn?
train +ablation=[no_lrn,no_lrn] > names an ablation twice
train +ablation=[one_gpu,no_communication] > no communication
train +ablation=no_lrn net.lrn=true > is not in effect
train +ablation=3 > there is no ablation=3
train ablation=no_lrn > +ablation=
train =3 > error
train epochs > epochs
train --nope > there is no flag --nope
train --epochs=3 > there is no flag --epochs=3
train -x > there is no flag -x
train +epoch=3 > there is no option 'epoch'
train epoch=3 > did you mean epochs?
train lr=0.1 > did you mean optim.lr?
train +experiment=figure_2 > there are:
train seed=0,1 > use -m
train epochs={a:1} > epochs
train data=photos,cifar10 > use -m
train epochs=2)( > epochs
prepare data=imagenette > source=PATH
prepare data=imagenette source=nowhere > there is nothing at source=nowhere
prepare source=here > no effect with data=photos
prepare workers=2 > no effect with data=photos
prepare max_bad=3 > no effect with data=photos
prepare data=folder source=x workers=0 > at least 1
prepare data=folder source=x max_bad=-1 > at least 0
prepare data=folder source=x data.hold_out_every=1 > at least 2
prepare data=imagenet_fall2009 source=x data.hold_out_seed=-1 > at least 0
prepare data=folder source=x verify=true > no effect with verify=true
prepare data=folder verify=maybe > true or false
prepare data=folder overwrite=please > true or false
prepare data=folder data.image_size=big > whole number
prepare data=folder verify=true > there is no store
prepare epochs=3 > has no effect on prepare
prepare data=folder epochs=3 > there is no option 'epochs'
evaluate > run=FOLDER
evaluate run=nowhere > is not the folder of a run
evaluate runs=[a,a] > names a run twice
evaluate run=a runs=[b] > say which run
evaluate run=a views=twelve > one of centre, ten_crop
evaluate run=a checkpoint=../../x > last, previous, best or epoch-N
evaluate runs=true > true is not the folder of a run
evaluate run=a checkpoint=first > last, previous, best or epoch-N
evaluate run=a out=numbers.txt > must end with .json
evaluate run=a split=unlabelled out=numbers.json > must end with .txt
evaluate run=a split=holdout > one of train, val, test
evaluate run=a batch_size=-1 > at least 1
evaluate run=a batch_size=big > whole number
evaluate run=a trainer.workers=-1 > at least 0
evaluate run=a trainer.checkpoint_minutes=3 > has no effect on evaluate
evaluate ensemble=three_cnns > there are: five_cnns, one_cnn, seven_cnns
evaluate run=a ensemble.weights=fit > one of equal, search
evaluate seed=3 > there is no option 'seed'
report runs=nowhere > holds no finished run
report results=nowhere > there is no folder nowhere
report images=0 > at least 1
report images=-5 > at least 1
report batch_size=0 > at least 1
report placement.replicas=2 > works on one device
report readme=perhaps > true or false
report out=/proc/nope > /proc/nope
report logger=mlflow > there are: csv, tensorboard, wandb
bench only=everything > one of prepare, loader, step
bench repeats=0 > at least 1
bench batch_size=0 > at least 1
bench repeats=often > whole number
bench trainer.precision=32-true > has no effect on bench
bench trainer.workers=3 > has no effect on bench
bench out=/proc/nope/x.json only=loader repeats=1 > /proc/nope
features > run, source and out are needed
features run=a source=b > run, source and out are needed
features run=nowhere source=b out=x.npz > is not the folder of a run
features run=nowhere.ckpt source=b out=x.npz > there is no checkpoint nowhere.ckpt
features run=nowhere.safetensors source=b out=x.npz > there is no file nowhere.safetensors
features run=a source=b out=x.csv > must end with .npz, .h5, .parquet
features run=a source=b out=x.npz layers=[] > at least 1
features run=a source=b out=x.npz layers=fc7 > write layers=[fc7]
features run=a source=b out=x.npz checkpoint=first > last, previous, best or epoch-N
features run=a source=b out=x.npz batch_size=0 > at least 1
features run=a source=b out=x.npz split=holdout > one of train, val, test
features run=a source=b out=x.npz per_tower=2 > true or false
features run=a source=b out=x.npz at_chance=maybe > true or false
features run=a source=b out=x.npz device=3 > a word
features layer=[fc7] > there is no option 'layer'
export > say which net to export
export run=nowhere > is not the folder of a run
export run=a format=keras > one of safetensors, onnx, torchscript, hub
export run=a checkpoint=x > checkpoint=x
export run=a at_chance=1 > true or false
convert > source and run are needed
convert source=nowhere.onnx run=x > there is no file nowhere.onnx
convert source=a run=b mean=[1,2] > three numbers
convert source=a run=b mean=[1,2,-3] > from 0 to 255
convert source=a run=b store=null > a word
"""

CASES = [(*line.split(" > ")[0].split(" "), line.split(" > ")[1]) for line in LINES.strip().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[f"{i} {' '.join(case[:-1])}"[:70] for i, case in enumerate(CASES)])
def test_wrong_command_line(case: tuple[str, ...], cwd: Path, run_command: Callable[..., tuple[int, str, str]]) -> None:
    name, *arguments, expected = case
    if name == "train" and not any(argument.startswith(("data=", "data.")) for argument in arguments):
        arguments += ["data.train_per_class=2", "data.val_per_class=1"]  # a small store is quick to prepare
    start = time.monotonic()
    status, _, err = run_command(name, *arguments)
    assert time.monotonic() - start < 10
    assert status == 2, err
    messages = [line for line in err.splitlines() if line.strip() and "preparing" not in line]
    assert expected in err
    assert "Traceback" not in err
    assert len(messages) <= 3, messages
    assert messages[0].startswith("error: "), messages
    assert not [path for path in cwd.rglob("*") if not path.is_relative_to(cwd / "stores")]
