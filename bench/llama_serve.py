"""llama.cpp's own server from the wheel of xllamacpp, which compiles its code unchanged, with the few options of
`llama-server` that are used here: where there is no such program, this takes its place."""

import argparse
import threading

FLASH = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}


def main() -> None:
    """Serve until killed."""
    import xllamacpp as llama  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("-c", "--ctx-size", type=int, default=0)
    parser.add_argument("-np", "--parallel", type=int, default=4)
    parser.add_argument("-t", "--threads", type=int, default=-1)
    parser.add_argument("-ctk", "--cache-type-k", default="f16")
    parser.add_argument("-ctv", "--cache-type-v", default="f16")
    parser.add_argument("-fa", "--flash-attn", choices=list(FLASH), default="auto")
    arguments = parser.parse_args()
    settings = llama.CommonParams()
    settings.model.path, settings.port = arguments.model, arguments.port
    settings.n_ctx, settings.n_parallel = arguments.ctx_size, arguments.parallel
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = arguments.threads
    for name in ("cache_type_k", "cache_type_v"):
        setattr(settings, name, getattr(llama.ggml_type, f"GGML_TYPE_{getattr(arguments, name).upper()}"))
    settings.flash_attn_type = getattr(
        llama.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{FLASH[arguments.flash_attn]}"
    )
    settings.fit_params = False
    server = llama.Server(settings)
    print(f"listening on {server.listening_address}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
