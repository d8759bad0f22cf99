"""Speed, measured: prefill and decode apart, dense and sparse, beside other engines."""
