"""What the peers of filter and sample are called in rows and tables."""

OURS = "scmini"
STAGE = "scmini, the whole stage"
PLAIN = "numpy einsum"
READING = "reading alone"

OURS_VLLM = "scmini, vLLM"
BARE = "bare vLLM loop"
BARE_TEXTS = "bare vLLM loop, with texts"
TRANSFORMERS = "scmini, transformers"
GENERATE = "transformers' generate"
