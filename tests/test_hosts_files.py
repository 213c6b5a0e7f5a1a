"The files for several machines in examples/hosts: their syntax, and that every option exists"
import re, shlex, subprocess
from pathlib import Path
import pytest, yaml
from deqdet.cli import deqdet_train
from deqdet.shell import parser_of

FOLDER = Path(__file__).parents[1]/'examples'/'hosts'
FILES = sorted(FOLDER.iterdir())

def commands(text):
    "Command lines in a file, those of comments too, with continued lines joined"
    text = re.sub(r'^\s*# ?', '', text, flags=re.M).replace('\\\n', ' ')
    if 'exec torchrun' in text: text = re.sub(r'exec torchrun.*?(?=\n\s+env:)', lambda m: ' '.join(m[0].split()), text, flags=re.S)
    return [o.strip() for o in text.splitlines() if 'deqdet_train' in o and '--' in o]

def options(words): return {o.split('=')[0] for o in words if o.startswith('--')}

def known(command):
    "The options of a launcher"
    if command=='torchrun': from torch.distributed.run import get_args_parser as parser
    else: from accelerate.commands.launch import launch_command_parser as parser
    return {s for a in parser()._actions for s in a.option_strings}

@pytest.mark.parametrize('file', FILES, ids=lambda o: o.name)
def test_options_exist(file):
    lines = commands(file.read_text())
    assert lines, file
    for line in lines:
        words = shlex.split(line)
        launcher = next(i for i,o in enumerate(words) if o in ('torchrun','accelerate'))
        train = words.index('deqdet_train')
        assert options(words[launcher:train]) <= known(words[launcher])
        ours = {s for a in parser_of(deqdet_train)._actions for s in a.option_strings}
        assert {'--out','--resume'} <= options(words[train:]) <= ours
        assert words[train-1] in ('--no-python','--no_python')

def test_batch_script():
    file = FOLDER/'slurm.sh'
    assert subprocess.run(['bash', '-n', file]).returncode==0
    asked = dict(re.findall(r'^#SBATCH --([\w-]+)(?:=(.*))?$', file.read_text(), re.M))
    assert asked['nodes']=='2' and asked['ntasks-per-node']=='1' and 'requeue' in asked
    gpus = re.search(r'--nproc-per-node (\d+)', file.read_text())[1]
    assert asked['gpus-per-node']==gpus

def test_accelerate_config():
    from accelerate.commands.config.config_args import load_config_from_file
    c = load_config_from_file(str(FOLDER/'accelerate.yaml'))
    assert (c.num_machines, c.num_processes, c.machine_rank, c.distributed_type)==(2, 16, 0, 'MULTI_GPU')

def test_job_manifest():
    service,job = yaml.safe_load_all((FOLDER/'kubernetes.yaml').read_text())
    assert (service['kind'], service['apiVersion'], job['kind'], job['apiVersion'])==('Service', 'v1', 'Job', 'batch/v1')
    pod = job['spec']['template']['spec']
    container, = pod['containers']
    assert pod['subdomain']==service['metadata']['name']==job['metadata']['name']
    assert service['spec']['selector']['job-name']==job['metadata']['name'] and service['spec']['clusterIP']=='None'
    assert {o['name'] for o in container['volumeMounts']}=={o['name'] for o in pod['volumes']}
    text, = container['args']
    assert subprocess.run(['sh', '-n', '-c', text]).returncode==0
    gpus = container['resources']['limits']['nvidia.com/gpu']
    assert f"--nnodes {job['spec']['completions']} --nproc-per-node {gpus} " in text
    assert f"--master-addr {job['metadata']['name']}-0.{pod['subdomain']} " in text
