"""Draws a run's loss with the model's last answer to each prompt under it, as in README.md.

python examples/plot_run.py runs/RUN_ID picture.png
"""

import sys
import textwrap

from gpt_jax import runs

workdir, file = sys.argv[1:]
figure = runs.plot_loss(runs.load_metrics(workdir))
samples = runs.load_samples(workdir)
lines = []
for sample in samples[samples["step"] == samples["step"].max()].itertuples():
    lines += [f"> {sample.prompt}", *textwrap.wrap(str(sample.text), 88), ""]
figure.set_size_inches(8, 3.4 + 0.16 * len(lines))
figure.supxlabel("\n".join(lines), x=0.06, ha="left", family="monospace", fontsize=8)
figure.savefig(file, dpi=100)
