"""Models share which of their fields were set, and nothing that one of them does with it shows in another."""

from __future__ import annotations

from resilientllm_api.plan import StageId


def test_models_with_the_same_fields_share_one_set_of_their_names() -> None:
    one, other = StageId(instance=0, stage=1), StageId(instance=2, stage=3)
    assert one.__pydantic_fields_set__ is other.__pydantic_fields_set__
    assert one.model_fields_set == {"instance", "stage"}


def test_a_copy_that_sets_more_leaves_the_others_as_they_were() -> None:
    bare = StageId.model_construct({"instance"}, instance=0)
    another = StageId.model_construct({"instance"}, instance=1)
    assert bare.model_copy(update={"stage": 5}).model_fields_set == {"instance", "stage"}
    assert another.model_fields_set == {"instance"}
