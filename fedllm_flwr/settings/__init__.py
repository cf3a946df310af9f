"""The typed settings of a run, by what they are about; `fedllm_flwr.config` puts them together."""
