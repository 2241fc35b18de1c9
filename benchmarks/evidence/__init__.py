"""When does near-policy distillation pay? A study on small tasks with verifiers.

python -m benchmarks.evidence             # run what is missing, then write the page; hours on two cores
python -m benchmarks.evidence --list      # cells, and which stand
python -m benchmarks.evidence --cell coins/npd/0    # one cell anew: a figure that you doubt
python -m benchmarks.evidence page        # docs/evidence.md from benchmarks/results/evidence/ alone

A cell is a task, an arm and a seed; a line of benchmarks/results/evidence/TASK.jsonl, and what stands is not run again.
hypotheses.py was written before the first cell was run; what was added later has its date.
"""
