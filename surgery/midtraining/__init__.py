"""Continued pretraining of any checkpoint that surgery reads: one loop, and small functions that enter it.

A run as its YAML says it
    settings.py (sections.py, settings_data.py, settings_train.py)   every key, its default and what it means
    run_file.py conventions.py foreign.py     the file read and written; other trainers' habits, and their configs
    amounts.py schedule.py batching.py        "50B tokens", rates by step, rows by step
    course.py objections.py dry_run.py        what all that comes to, what stands against it, a forecast
From settings to trained weights
    run.py loop.py step.py after_step.py      the run, its steps, one step's gradients, what follows a step
    model.py start.py recorded_rate.py        the model, Adam's moments, the rate that it came with
    sources.py dialogue.py                    rows of plans, of conversations, of preferences
    loss.py preference.py reference.py        what is minimised
    optimizer.py skip_step.py averages.py     AdamW by groups, spikes left out, running means
    precision.py fp8.py compiling.py          how it is computed
Mixtures of experts
    experts.py (experts_layout.py, experts_torch.py, experts_padded.py, experts_triton.py)   ways to run experts
    routers.py balance.py router_telemetry.py          found, kept balanced, measured
    attention_experts.py                               groups of heads that are experts
    attention.py masks/                                sparse attention, and what it sees
Many processes
    launching.py parallel.py sharding.py mesh.py       started, agreeing, dividing a model, tested
Kept and gone on with
    run_folder.py checkpoint.py saving.py resuming.py export.py stopping.py
Told
    told.py log.py panel.py trackers.py clock.py throughput.py evaluating.py evaluation/ report/
Around runs
    selftests.py sweep.py seeds.py                     tests beforehand, keys tried, seeds and their soup
"""
