"""SmolLM2-135M: the weights, the model in NNX and in linen, and the text it is tried on."""
