"""One step of ours equals TRL's DPOTrainer on the flattened pairs: loss, rewards, gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import gradients, random_ids, tiny_model, with_lora

from scmini.training.batches import Group
from scmini.training.losses import PreferenceObjective
from scmini.training.scoring import score
from scmini.training.tree_trainer import TreeModule

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

K, PROMPTS, BETA = 3, 2, 0.2


def _prompts() -> list[tuple[list[int], list[list[int]]]]:
    """Prompt ids, and chosen and rejected ids; of equal k, as a mean over pairs is over prompts."""
    return [
        (random_ids(p, 6), [random_ids(10 * p + j + 1, 3 + j) for j in range(1 + K)])
        for p in range(PROMPTS)
    ]


def _trl_step(out: Path) -> tuple[float, dict[str, torch.Tensor]]:
    rows = [
        {"prompt_ids": prompt, "chosen_ids": responses[0], "rejected_ids": rejected}
        for prompt, responses in _prompts()
        for rejected in responses[1:]
    ]

    class OfIds(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
            return dataset  # token ids already, which TRL itself does not take

    from training_helpers import tiny_tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    model = with_lora(tiny_model())
    trainer = OfIds(
        model=model,
        args=trl.DPOConfig(
            output_dir=str(out),
            beta=BETA,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            max_length=None,
            per_device_train_batch_size=len(rows),
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )
    # TRL keeps a frozen copy of a given adapter as its reference. Ours is the base model here, so
    # that rewards are not zero: empty the copy.
    reference = [p for n, p in trainer.model.named_parameters() if ".ref." in n]
    assert reference, "TRL no longer keeps a reference adapter"
    with torch.no_grad():
        for parameter in reference:
            parameter.zero_()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = {
        name.replace(".default", ""): grad
        for name, grad in gradients(trainer.model).items()
        if ".ref." not in name
    }
    return loss.item(), grads


def test_loss_and_gradients(tmp_path: Path) -> None:
    model = with_lora(tiny_model())
    module = TreeModule(model)
    groups = [Group.of_responses(str(p), *ids) for p, ids in enumerate(_prompts())]
    with model.disable_adapter():
        references = score(module, groups, 10_000)
    groups = [
        Group(g.id, g.sequences, g.num_scored, ref)
        for g, ref in zip(groups, references, strict=True)
    ]
    from scmini_kernels import PrefixTree

    logps = module(PrefixTree.pack([g.sequences for g in groups]))
    loss = PreferenceObjective(BETA)(logps, groups)[0] / PROMPTS
    loss.backward()
    theirs, grads = _trl_step(tmp_path)
    assert abs(loss.item() - 0.6931) > 0.01, "rewards are zero: nothing is compared"
    assert loss.item() == pytest.approx(theirs, abs=1e-4)
    ours = {
        k.replace(".default", "").removeprefix("model."): v for k, v in gradients(model).items()
    }
    grads = {k.removeprefix("model."): v for k, v in grads.items()}
    assert set(ours) == set(grads)
    for key, grad in grads.items():
        torch.testing.assert_close(ours[key], grad, rtol=1e-3, atol=1e-5, msg=key)
