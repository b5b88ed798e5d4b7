"Sweeps: what a trial costs besides its fit, in a kernel that is kept and in one that is started for it."
import itertools, tempfile
from pathlib import Path
import nbformat
from bench import benchmark

CELLS = ['x = 0.0  # Place\nrun_dir = ""  # Folder of the run', '''import pandas as pd
from gcode_ml.core.tiny import tiny_learner
from gcode_ml.lab.runs import open_run
run = open_run(run_dir)
result = run.finish(pd.DataFrame([dict(measure='x', value=x)]), validation=dict(x=x))
run._lock.release()''']

@benchmark('a trial that fits nothing, by the clock, in a kernel that has run others', 'papermill with a kernel of its own, which imports anew', .3)
def warm_kernel(quick):
    from gcode_ml.lab.experiment import execute
    from gcode_ml.lab.sweeps import WarmKernel
    folder,number,kernel = Path(tempfile.mkdtemp()),itertools.count(),WarmKernel()
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')), cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    nb.cells[0].metadata['tags'] = ['parameters']
    nbformat.write(nb, folder/'empty.ipynb')
    def words(): i = next(number); return folder/'empty.ipynb', folder/f'{i}.ipynb', dict(x=1., run_dir=str(folder/'runs'/str(i)))
    def ours(): kernel.execute(*words())
    def theirs(): execute(*words())
    ours() # the first one starts the kernel
    return ours, theirs
