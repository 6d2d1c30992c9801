"""Decoders of the field's checkpoints beside plain, slow versions of their public samplers: `python -m bench.field`.

layouts, published    small random checkpoints, as the field publishes them
plain*                one row, without a cache, as each public sampler writes it
plan                  layouts by decoders by selection rules
"""
