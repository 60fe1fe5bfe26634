"""Generates tokens with an engine of its own: generate.py JOB.json OUT.json (see test_processes.py)."""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # ranks import this file again
    job = json.loads(Path(sys.argv[1]).read_text())
    params = [
        SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, extra_args={"precision": p})
        for _, p in job["asked"]
    ]
    llm = LLM(**job["arguments"])
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in job["asked"]], params, use_tqdm=False)
    Path(sys.argv[2]).write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
