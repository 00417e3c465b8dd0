"""Parts of a whole parameter: padding, indices, and names."""

import torch

from megatron_kd.models.parameters import global_parameter_name, global_shape, take_local_part
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import tiny_model


def test_parts_pick_rows_and_columns_and_pad_with_zeros():
    whole = torch.arange(12.0).view(4, 3)
    part = take_local_part(whole, [torch.tensor([2, 3, 4, 5]), torch.tensor([0, 2])])
    assert part.tolist() == [[6, 8], [9, 11], [0, 0], [0, 0]]
    assert torch.equal(take_local_part(whole, [torch.arange(4), torch.arange(3)]), whole)
    assert take_local_part(torch.arange(3.0), [torch.tensor([1, 3])]).tolist() == [1, 0]


def test_names_and_shapes_of_an_unsharded_model_are_its_own():
    with distributed_runtime():
        model = tiny_model()
        for name, parameter in model.named_parameters():
            assert global_parameter_name(model, name) == name
            expected = (300, 32) if "embedding" in name else tuple(parameter.shape)
            assert global_shape(name, parameter, model) == expected
        assert global_parameter_name(model, "output_layer.weight") == "embedding.word_embeddings.weight"
