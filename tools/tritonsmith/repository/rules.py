"""What Triton refuses, or silently ignores, when it loads a configuration.

The rules are those of Triton core's `src/model_config_utils.cc` (ValidateModelConfig,
ValidateInstanceGroup), and a few combinations that load but do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tritonclient.grpc import model_config_pb2

from tritonsmith.errors import RecipeError


def check_rules(config: model_config_pb2.ModelConfig) -> None:
    """Raise RecipeError for a combination of fields that Triton would refuse or ignore."""
    for error in broken_rules(config):
        raise error


def broken_rules(config: model_config_pb2.ModelConfig) -> Iterator[RecipeError]:
    """What `check_rules` would raise, of every rule the first."""
    for rule in _RULES:
        try:
            rule(config)
        except RecipeError as error:
            yield error


def _check_dynamic_batching(config: model_config_pb2.ModelConfig) -> None:
    if not config.HasField("dynamic_batching"):
        return
    if config.max_batch_size == 0:
        raise RecipeError(
            f"config.dynamic_batching does nothing for model {config.name!r}",
            found="max_batch_size 0",
            expected="max_batch_size 1 or more",
            fix="leave dynamic_batching out; a model without a batch axis cannot be batched",
        )
    batching = config.dynamic_batching
    _check_sizes(config, "config.dynamic_batching.preferred_batch_size", batching.preferred_batch_size)
    _check_priorities(batching)
    if batching.preserve_ordering:
        _check_ordering(batching)


def _check_sizes(config: model_config_pb2.ModelConfig, place: str, sizes: Iterable[int]) -> None:
    for size in sizes:
        if not 0 < size <= config.max_batch_size:
            raise RecipeError(
                f"{place} does not fit max_batch_size",
                found=size,
                expected=f"1 to {config.max_batch_size}",
                fix="lower it, or raise [model] max_batch_size",
            )


def _check_priorities(batching: model_config_pb2.ModelDynamicBatching) -> None:
    levels = batching.priority_levels
    place = "config.dynamic_batching"
    if levels == 0:
        if batching.default_priority_level or batching.priority_queue_policy:
            raise RecipeError(
                f"{place} names a priority but has no priority_levels", fix=f"set {place}.priority_levels"
            )
        return
    if not 1 <= batching.default_priority_level <= levels:
        raise RecipeError(
            f"{place}.default_priority_level does not fit priority_levels",
            found=batching.default_priority_level or "not set",
            expected=f"1 to {levels}",
        )
    for level in batching.priority_queue_policy:
        if not 1 <= level <= levels:
            raise RecipeError(
                f"{place}.priority_queue_policy.{level} is no priority level", expected=f"1 to {levels}"
            )


def _check_ordering(batching: model_config_pb2.ModelDynamicBatching) -> None:
    place = "config.dynamic_batching"
    if batching.priority_levels > 1:
        raise RecipeError(
            f"{place}.preserve_ordering and several priority_levels exclude each other",
            found=f"{batching.priority_levels} levels",
            expected="at most 1",
        )
    policies = {f"{place}.default_queue_policy": batching.default_queue_policy}
    policies |= {f"{place}.priority_queue_policy.{k}": v for k, v in batching.priority_queue_policy.items()}
    for name, policy in policies.items():
        if policy.default_timeout_microseconds and policy.timeout_action == policy.DELAY:
            raise RecipeError(f"{name}.timeout_action DELAY and preserve_ordering exclude each other")


def _check_sequence_batching(config: model_config_pb2.ModelConfig) -> None:
    if not config.HasField("sequence_batching"):
        return
    batching = config.sequence_batching
    _check_sizes(
        config, "config.sequence_batching.oldest.preferred_batch_size", batching.oldest.preferred_batch_size
    )
    use = batching.direct.minimum_slot_utilization
    if not 0 <= use <= 1:
        raise RecipeError(
            "config.sequence_batching.direct.minimum_slot_utilization is no share",
            found=use,
            expected="0 to 1",
        )


def _check_response_cache(config: model_config_pb2.ModelConfig) -> None:
    if not config.response_cache.enable:
        return
    for excluded, place in (
        (config.model_transaction_policy.decoupled, "config.model_transaction_policy.decoupled"),
        (config.HasField("sequence_batching"), "config.sequence_batching"),
    ):
        if excluded:
            raise RecipeError(
                f"config.response_cache and {place} exclude each other", fix="keep one of the two"
            )


def _check_instance_groups(config: model_config_pb2.ModelConfig) -> None:
    for index, group in enumerate(config.instance_group):
        place = f"config.instance_group[{index}]"
        if group.count < 0:
            raise RecipeError(f"{place}.count is negative", found=group.count, expected="1 or more")
        kind = model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind)
        if kind in ("KIND_CPU", "KIND_MODEL") and group.gpus:
            raise RecipeError(
                f"{place}.gpus and kind {kind} exclude each other",
                found=list(group.gpus),
                fix="leave gpus out, or set kind to KIND_GPU",
            )
        if group.profile and config.platform != "tensorrt_plan" and config.backend != "tensorrt":
            raise RecipeError(f"{place}.profile is for TensorRT only", found=f"backend {config.backend!r}")


def _check_version_policy(config: model_config_pb2.ModelConfig) -> None:
    policy = config.version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "specific" and not policy.specific.versions:
        raise RecipeError("config.version_policy.specific.versions is empty", expected="at least one version")
    if choice == "specific" and any(version < 1 for version in policy.specific.versions):
        raise RecipeError(
            "config.version_policy.specific.versions holds no version",
            found=list(policy.specific.versions),
            expected="1 or more",
        )
    if choice == "latest" and policy.latest.num_versions == 0:
        raise RecipeError(
            "config.version_policy.latest.num_versions is 0, which serves nothing", expected="1 or more"
        )


def _check_warmup(config: model_config_pb2.ModelConfig) -> None:
    limit = max(1, config.max_batch_size)
    for index, entry in enumerate(config.model_warmup):
        if entry.batch_size > limit:
            raise RecipeError(
                f"config.model_warmup[{index}].batch_size does not fit max_batch_size",
                found=entry.batch_size,
                expected=f"1 to {limit}",
            )


_RULES: tuple[Callable[[model_config_pb2.ModelConfig], None], ...] = (
    _check_dynamic_batching,
    _check_sequence_batching,
    _check_response_cache,
    _check_instance_groups,
    _check_version_policy,
    _check_warmup,
)
