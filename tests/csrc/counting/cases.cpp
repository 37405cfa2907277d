// Runs every kernel once at shapes like the benchmarks', and prints what it asked of memory, a line of JSON each.
//
// Shapes are smaller than the benchmarks' where ratios do not depend on the size. "compulsory" is every input
// read once and every output written once.
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "checks/inputs.h"
#include "counting/hooks.h"
#include "emulate/block.h"
#include "kernels/lora_grad_b.h"
#include "kernels/merge_weights.h"
#include "kernels/orthonormalize.h"
#include "kernels/project_rows.h"
#include "kernels/projected_adamw.h"
#include "kernels/sketch_rows.h"

namespace {

using gpu::Format;

// One allocation that a launch may use, every array in it aligned as a GPU's allocator does.
class Memory {
 public:
  Memory() : bytes_(size_t{64} << 20) {}

  template <typename T>
  T* take(size_t count) {
    used_ = (used_ + 255) / 256 * 256;
    auto* found = reinterpret_cast<T*>(bytes_.data() + align_ + used_);
    used_ += count * sizeof(T);
    if (align_ + used_ > bytes_.size()) std::abort();
    return found;
  }
  float* normal(size_t count) {
    std::normal_distribution<float> draw;
    float* found = take<float>(count);
    for (size_t i = 0; i < count; ++i)
      found[i] = draw(random_);
    return found;
  }
  // bfloat16 numbers, of which only the size matters.
  uint16_t* halves(size_t count) {
    auto* found = take<uint16_t>(count);
    for (size_t i = 0; i < count; ++i)
      found[i] = static_cast<uint16_t>(0x3f00 + i % 128);
    return found;
  }
  float* basis(int d, int k) {
    const std::vector<double> q = check::orthonormal_columns_of(d, k);
    float* found = take<float>(q.size());
    for (size_t i = 0; i < q.size(); ++i)
      found[i] = static_cast<float>(q[i]);
    return found;
  }
  void* workspace(int64_t bytes) { return take<unsigned char>(static_cast<size_t>(bytes) + 1); }

  const void* begin() const { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }

 private:
  std::vector<unsigned char> bytes_;
  size_t align_ = (256 - reinterpret_cast<uintptr_t>(bytes_.data()) % 256) % 256, used_ = 0;
  std::mt19937 random_{1};
};

bool failed = false;

template <typename Launch>
void count(const char* kernel, const std::string& name, const Memory& memory, double compulsory,
           Launch&& launch) {
  counting::begin(memory.begin(), memory.size());
  const cudaError_t error = launch();
  const counting::Counts counts = counting::end();
  if (error != cudaSuccess) {
    std::fprintf(stderr, "%s, %s: %s\n", kernel, name.c_str(), emulate::last_error().c_str());
    failed = true;
  }
  std::printf(
      "{\"kernel\": \"%s\", \"case\": \"%s\", \"compulsory\": %.0f, \"requests\": %lu, \"read_sectors\": "
      "%lu, "
      "\"written_sectors\": %lu, \"ideal_sectors\": %lu, \"wavefronts\": %lu, \"ideal_wavefronts\": %lu, "
      "\"products\": {",
      kernel, name.c_str(), compulsory, counts.requests, counts.read_sectors, counts.written_sectors,
      counts.ideal_sectors, counts.wavefronts, counts.ideal_wavefronts);
  const char* comma = "";
  for (const auto& [line, lanes] : counts.product_lanes) {
    std::printf("%s\"%d\": %lu", comma, line, lanes / 32);
    comma = ", ";
  }
  std::printf("}}\n");
  std::fflush(stdout);
}

std::string text(const char* format, int a, int b = 0, int c = 0) {
  char line[100];
  std::snprintf(line, sizeof(line), format, a, b, c);
  return line;
}

void project_rows(int rows, int d, int k) {
  Memory memory;
  const size_t size = static_cast<size_t>(rows) * d;
  const keeplora::ProjectRowsProblem<float> problem{
      memory.normal(size), memory.basis(d, k), memory.take<float>(size), rows, d, k, 1.0f};
  void* workspace = memory.workspace(keeplora::project_rows_workspace(&problem, 1, 2));
  float leak;
  count("project_rows", text("[%d, %d], k %d", rows, d, k), memory, 4.0 * (2.0 * size + 1.0 * d * k),
        [&] { return keeplora::project_rows(&problem, 1, 2, &leak, workspace, nullptr); });
}

void projected_adamw(int rows, int d, int k) {
  Memory memory;
  const size_t size = static_cast<size_t>(rows) * d;
  keeplora::ProjectedAdamWProblem<float> problem{};
  problem.a = memory.normal(size), problem.exp_avg = memory.normal(size), problem.grad = memory.normal(size);
  problem.exp_avg_sq = memory.take<float>(size);
  for (size_t i = 0; i < size; ++i)
    problem.exp_avg_sq[i] = 1;
  problem.grad_format = Format::kFloat32, problem.q = memory.basis(d, k);
  problem.rows = rows, problem.d = d, problem.k = k, problem.lr = 1e-3f, problem.step = 10;
  void* workspace = memory.workspace(keeplora::projected_adamw_workspace(&problem, 1));
  float leak;
  count("projected_adamw", text("[%d, %d], k %d", rows, d, k), memory, 4.0 * (7.0 * size + 1.0 * d * k), [&] {
    return keeplora::projected_adamw(&problem, 1, {0.9, 0.999, 1e-8, 0.01}, &leak, workspace, nullptr);
  });
}

void merge_weights(int rows, int cols, int r, Format in) {
  Memory memory;
  const size_t size = static_cast<size_t>(rows) * cols;
  keeplora::MergeWeightsProblem<float> problem{};
  const bool wide = in == Format::kFloat32;
  problem.w = wide ? static_cast<void*>(memory.normal(size)) : memory.halves(size);
  problem.a = memory.normal(static_cast<size_t>(r) * cols);
  problem.b = memory.normal(static_cast<size_t>(r) * rows);
  problem.origin = memory.normal(static_cast<size_t>(r) * rows);
  problem.out = memory.take<uint16_t>(size);
  problem.pitch = cols, problem.rows = rows, problem.cols = cols, problem.r = r, problem.scale = 1;
  problem.w_format = in, problem.a_format = problem.b_format = problem.origin_format = Format::kFloat32;
  problem.out_format = Format::kBfloat16;
  const double compulsory = size * (wide ? 6.0 : 4.0) + 4.0 * r * (cols + 2.0 * rows);
  count("merge_weights",
        text(wide ? "[%d, %d], r %d, float32 to bfloat16" : "[%d, %d], r %d, bfloat16", rows, cols, r),
        memory, compulsory, [&] { return keeplora::merge_weights(&problem, 1, nullptr); });
}

void lora_grad_b(int tokens, int out, int adapters, int r, Format dy) {
  Memory memory;
  const bool wide = dy == Format::kFloat32;
  const size_t size = static_cast<size_t>(tokens) * out;
  keeplora::LoraGradBProblem problem{};
  problem.dy = wide ? static_cast<void*>(memory.normal(size)) : memory.halves(size);
  problem.t = memory.normal(static_cast<size_t>(tokens) * r * adapters);
  problem.dy_pitch = out, problem.t_pitch = r * adapters, problem.tokens = tokens;
  problem.dy_format = dy, problem.t_format = Format::kFloat32;
  std::vector<keeplora::LoraGradBAdapter<float>> table;
  for (int i = 0; i < adapters; ++i)
    table.push_back({memory.take<float>(static_cast<size_t>(out) / adapters * r), r * i, r,
                     out / adapters * i, out / adapters * (i + 1), 1.0f});
  const double compulsory = size * (wide ? 4.0 : 2.0) + 4.0 * r * (1.0 * tokens * adapters + out);
  const std::string name = text(wide ? "[%d, %d], %d adapters, float32" : "[%d, %d], %d adapters, bfloat16",
                                tokens, out, adapters);
  count("lora_grad_b", name, memory, compulsory,
        [&] { return keeplora::lora_grad_b(problem, table.data(), adapters, nullptr); });
}

void orthonormalize(int d, int l, int k) {
  Memory memory;
  const size_t size = static_cast<size_t>(d) * l;
  const keeplora::OrthonormalizeProblem<float> problem{
      memory.normal(size), memory.basis(d, k), memory.take<float>(size), d, l, k};
  void* workspace = memory.workspace(keeplora::orthonormalize_workspace(&problem, 1));
  int64_t rank;
  count("orthonormalize", text("[%d, %d], k %d", d, l, k), memory, 4.0 * (2.0 * size + 1.0 * d * k),
        [&] { return keeplora::orthonormalize(&problem, 1, &rank, workspace, nullptr); });
}

void sketch_rows(int tokens, int d, int width, Format in) {
  Memory memory;
  const bool wide = in == Format::kFloat32;
  const size_t size = static_cast<size_t>(tokens) * d;
  const auto made = [&] { return wide ? static_cast<void*>(memory.normal(size)) : memory.halves(size); };
  const keeplora::SketchRowsProblem problem{
      made(), in, made(), in, memory.normal(static_cast<size_t>(width) * d), tokens, d, d, width, 7};
  void* workspace = memory.workspace(keeplora::sketch_rows_workspace(problem));
  count("sketch_rows",
        text(wide ? "[%d, %d], width %d, float32" : "[%d, %d], width %d, bfloat16", tokens, d, width), memory,
        size * (wide ? 8.0 : 4.0) + 8.0 * width * d,
        [&] { return keeplora::sketch_rows(problem, workspace, nullptr); });
}

}  // namespace

int main() {
  project_rows(16, 768, 264);
  project_rows(16, 768, 198);
  project_rows(64, 1024, 224);
  projected_adamw(16, 768, 264);
  projected_adamw(64, 1024, 224);
  merge_weights(768, 768, 16, Format::kFloat32);
  merge_weights(1024, 1024, 64, Format::kBfloat16);
  lora_grad_b(2048, 576, 3, 16, Format::kBfloat16);
  lora_grad_b(2048, 576, 3, 16, Format::kFloat32);
  orthonormalize(768, 64, 264);
  sketch_rows(1024, 1024, 64, Format::kBfloat16);
  sketch_rows(1024, 1024, 64, Format::kFloat32);
  return failed;
}
