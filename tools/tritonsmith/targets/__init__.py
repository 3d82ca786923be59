"""One repository, several targets: what one model directory holds for each kind of machine.

`config.pbtxt` is the default; `configs/<target>.pbtxt` is a further target's, which Triton reads under
`--model-config-name=<target>`. Engine, files, instances and profiles differ; names, types and shapes do not.
"""
