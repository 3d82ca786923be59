"""How fast a served model is: perf_analyzer run for real, its export files read, a report drawn.

perf_analyzer.py   find or install the binary; one run of it at one concurrency
measure.py         several rounds at several concurrencies; medians, spread, instability
machine.py         on what it was measured
plots.py report.py pictures and the self-contained HTML report
"""
