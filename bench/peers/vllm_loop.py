"""The bare loop: `PYTHON vllm_loop.py` in an environment that has vLLM, which it alone imports.

stdin    the job, one JSON line: "engine", arguments of LLM, and "adapter", a folder or null;
         then a line per draw: {"prompts": [ids, ...], "n", "max_tokens", "texts": bool}
stdout   {"vllm": version, "torch": version} when it has started; then per draw
         {"answers", "tokens"}
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints is no result

    def send(message: dict[str, Any]) -> None:
        results.write(json.dumps(message) + "\n")
        results.flush()

    sys.path.pop(0)  # this folder: its modules are not vLLM's
    import torch
    import vllm
    from vllm.lora.request import LoRARequest

    job = json.loads(sys.stdin.readline())
    engine = vllm.LLM(**job["engine"])
    lora = LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None
    send({"vllm": vllm.__version__, "torch": torch.__version__})
    for line in sys.stdin:
        draw = json.loads(line)
        engine.reset_prefix_cache()  # of the same prompts, drawn with and without texts
        outputs = engine.generate(
            [{"prompt_token_ids": ids} for ids in draw["prompts"]],
            vllm.SamplingParams(
                n=draw["n"],
                temperature=1.0,
                top_p=1.0,
                max_tokens=draw["max_tokens"],
                ignore_eos=True,
                detokenize=draw["texts"],
            ),
            lora_request=lora,
            use_tqdm=False,
        )
        answers = [answer for output in outputs for answer in output.outputs]
        send({"answers": len(answers), "tokens": sum(len(a.token_ids) for a in answers)})


if __name__ == "__main__":
    main()
