"""IA3 on vLLM: the Engine protocol over vLLM's own engine, whose workers rescale their layers.

`worker` and `layers` run in vLLM's processes; all else beside the API. It needs an environment of
its own (`constraints-vllm.txt`), as vLLM wants an older transformers than our own engine.
"""
