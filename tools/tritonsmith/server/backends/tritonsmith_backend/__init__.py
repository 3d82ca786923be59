"""What the Python-based backends share.

These files run inside Triton's Python stub, in the server's own environment: numpy below 2, an engine, and
nothing of tritonsmith. A backend supplies an Engine; the rest is here: `config` holds config.pbtxt against
the model, `tensors` moves arrays in and out, `batch` runs requests together, `states` carries implicit state.
"""
