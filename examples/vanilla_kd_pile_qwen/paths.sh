# shellcheck shell=bash
# The paths and the launcher are those of ../miniplm_pile_qwen, so that both examples share one tokenised corpus.
# shellcheck source=examples/miniplm_pile_qwen/paths.sh
source examples/miniplm_pile_qwen/paths.sh
# shellcheck disable=SC2034 # the steps read it
HERE="examples/vanilla_kd_pile_qwen"
