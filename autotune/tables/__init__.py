"""Tables of tuned choices, one file a device, made by `longspan tune --export`; read by `longspan.autotune.lookup`."""
