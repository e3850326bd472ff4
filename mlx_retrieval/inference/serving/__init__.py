"""A server of models over HTTP: shapes of requests, the models behind them, limits, keys and figures."""
