"""Programs in forks of the process that tests: what they import is there.

An interpreter of their own takes seconds of imports before its first line. What depends on that start, or on how Python ends, runs in one all the same."""
import os, runpy, signal, sys, tempfile, traceback
import torch.distributed.run

def forked(f, timeout=300):
    "Call `f` in a fork: its exit status, and all that it and its own processes printed"
    with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as file:
        pid = os.fork()
        if not pid: _end(f, file.fileno(), timeout)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        file.seek(0)
        return code, file.read()

def _end(f, fd, timeout):
    "Call `f`, print to a file, and end"
    code = 1
    try:
        signal.alarm(timeout) # ends it
        for o in (1, 2): os.dup2(fd, o)
        sys.stdout,sys.stderr = (open(o, 'w', buffering=1, closefd=False) for o in (1, 2))
        os.environ.update(OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo', CUDA_VISIBLE_DEVICES='')
        f()
        code = 0
    except SystemExit as e: code = e.code or 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)

def forget():
    "Let the package be imported anew: `runs` reads the environment while it is"
    for name in [o for o in sys.modules if o.partition('.')[0]=='deqdet']: del sys.modules[name]

def script(path, *args):
    "What `python path args…` does, for `forked`"
    def f():
        forget()
        sys.argv = [str(path), *map(str, args)]
        runpy.run_path(str(path), run_name='__main__')
    return f

FORKS = '--run-path', '--start-method', 'fork' # torchrun's own options

def torchrun(path, *args, processes=2):
    "What `torchrun --nproc_per_node 2 path args…` does, for `forked`; its processes are forks too"
    def f():
        forget()
        torch.distributed.run.main(['--standalone', '--nproc_per_node', str(processes), *FORKS, str(path), *map(str, args)])
    return f

def accelerate(path, *args, processes=2):
    "What `accelerate launch --multi_gpu path args…` does, for `forked`; accelerate hands over to torchrun, whose processes are forks here"
    from accelerate.commands import launch
    run = torch.distributed.run.run
    def in_forks(o):
        o.run_path = True
        o.start_method = 'fork'
        run(o)
    def f():
        forget()
        torch.distributed.run.run = in_forks
        sys.argv = ['accelerate', '--multi_gpu', '--num_processes', str(processes), '--main_process_port', '0', str(path), *map(str, args)]
        launch.main()
    return f
