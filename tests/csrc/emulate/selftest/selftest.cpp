// Runs every kernel of kernels.cuh in a process of its own; what is found must be a column of table.txt.
//
//   selftest table.txt sequential|random|sanitized|raced|raced_across
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "emulate/selftest/kernels.cuh"

namespace {

// Exact-size memory, so that AddressSanitizer sees an access outside.
struct Floats {
  explicit Floats(int n) : data(new float[n]) {
    for (int i = 0; i < n; ++i)
      data[i] = static_cast<float>(i % 13);
  }
  ~Floats() { delete[] data; }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  float sum(int n) const {
    float total = 0;
    for (int i = 0; i < n; ++i)
      total += data[i];
    return total;
  }
  float* data;
};

// Each returns whether the result is right. A launch that failed has left its report.
template <selftest::Sum kDefect>
bool sum() {
  Floats x(1000), out(1);
  gpu::launch(selftest::sum_kernel<kDefect>, {dim3(1), dim3(256), 32}, x.data, 1000, out.data);
  return out.data[0] == 36 * x.sum(1000);
}

template <selftest::Reverse kDefect>
bool reverse() {
  Floats x(32), y(32);
  gpu::launch(selftest::reverse_kernel<kDefect>, {dim3(1), dim3(32), 128}, x.data, y.data);
  bool right = true;
  for (int i = 0; i < 32; ++i)
    right = right && y.data[i] == x.data[31 - i];
  return right;
}

template <selftest::Grid kDefect>
bool grid() {
  Floats x(8 * 32), partial(8), total(1);
  total.data[0] = 0;
  unsigned counters[2] = {};
  gpu::launch(selftest::grid_kernel<kDefect>, {dim3(8), dim3(32), 16}, x.data, partial.data, total.data,
              +counters);
  return total.data[0] == x.sum(8 * 32);
}

template <selftest::Copy kDefect>
bool copy() {
  constexpr int kLength = 5 * selftest::kTile - 3, kWhole = 5 * selftest::kTile;
  Floats x(kLength), y(kWhole);
  std::vector<float> before(kWhole);
  std::copy(x.data, x.data + kLength, before.begin());
  gpu::launch(selftest::copy_kernel<kDefect>, {dim3(1), dim3(32), (2 * selftest::kTile + 4) * 4}, x.data,
              kLength, y.data);
  bool right = true;
  for (int i = 0; i < kWhole; ++i)
    right = right &&
            y.data[i] ==
                before[i / selftest::kTile * selftest::kTile + selftest::kTile - 1 - i % selftest::kTile];
  return right;
}

template <selftest::Ring kDefect>
bool ring() {
  constexpr int kTiles = 7, kFloats = 384;
  // Bulk copies need addresses that are multiples of 16; operator new gives them.
  Floats x(kTiles * kFloats), out(3);
  gpu::launch(selftest::ring_kernel<kDefect>, {dim3(1), dim3(128), 2 * kFloats * 4 + 32}, x.data, kTiles,
              out.data);
  return out.sum(3) == x.sum(kTiles * kFloats);
}

template <selftest::Pair kDefect>
bool pair() {
  Floats out(4 * 64);
  gpu::launch(selftest::pair_kernel<kDefect>, {dim3(4), dim3(64), 256, nullptr, 2}, out.data);
  bool right = true;
  for (int i = 0; i < 4 * 64; ++i)
    right = right &&
            (out.data[i] == static_cast<float>(i / 64 % 2 == 0 ? 100 + i % 64 : i % 64) || i / 64 % 2 == 0);
  return right;
}

std::map<std::string, std::function<bool()>> cases() {
  using namespace selftest;
  return {
      {"sum clean", sum<Sum::kClean>},
      {"sum no_barrier", sum<Sum::kNoBarrier>},
      {"sum reuse_no_barrier", sum<Sum::kReuseNoBarrier>},
      {"sum reads_past_end", sum<Sum::kReadsPastEnd>},
      {"sum divergent", sum<Sum::kDivergent>},
      {"sum lane_missing", sum<Sum::kLaneMissing>},
      {"sum misaligned", sum<Sum::kMisaligned>},
      {"sum never_written", sum<Sum::kNeverWritten>},
      {"sum shared_past_end", sum<Sum::kSharedPastEnd>},
      {"reverse clean", reverse<Reverse::kClean>},
      {"reverse no_barrier", reverse<Reverse::kNoBarrier>},
      {"grid clean", grid<Grid::kClean>},
      {"grid no_await", grid<Grid::kNoAwait>},
      {"grid no_announce", grid<Grid::kNoAnnounce>},
      {"grid early_announce", grid<Grid::kEarlyAnnounce>},
      {"grid no_ticket", grid<Grid::kNoTicket>},
      {"grid plain_add", grid<Grid::kPlainAdd>},
      {"copy clean", copy<Copy::kClean>},
      {"copy no_wait", copy<Copy::kNoWait>},
      {"copy waits_for_too_few", copy<Copy::kWaitsForTooFew>},
      {"copy no_barrier", copy<Copy::kNoBarrier>},
      {"copy reuse_no_barrier", copy<Copy::kReuseNoBarrier>},
      {"copy misaligned", copy<Copy::kMisaligned>},
      {"copy reads_past_end", copy<Copy::kReadsPastEnd>},
      {"copy source_changed", copy<Copy::kSourceChanged>},
      {"ring clean", ring<Ring::kClean>},
      {"ring no_init_barrier", ring<Ring::kNoInitBarrier>},
      {"ring no_empty_wait", ring<Ring::kNoEmptyWait>},
      {"ring wrong_parity", ring<Ring::kWrongParity>},
      {"ring too_few_bytes", ring<Ring::kTooFewBytes>},
      {"ring no_arrival", ring<Ring::kNoArrival>},
      {"pair clean", pair<Pair::kClean>},
      {"pair no_barrier", pair<Pair::kNoBarrier>},
      {"pair early_exit", pair<Pair::kEarlyExit>},
  };
}

// What a process of its own prints while it runs the case under the schedule; "" if it finds nothing wrong.
std::string report(const std::function<bool()>& run, emulate::Schedule schedule) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 1);
    dup2(ends[1], 2);
    close(ends[0]);
    emulate::set_schedule(schedule);
    const bool right = run();
    const std::string& error = emulate::last_error();
    std::printf("%s", error.empty() ? right ? "" : "wrong" : error.c_str());
    std::exit(right && error.empty() ? 0 : 1);  // the race detector makes a 0 another number
  }
  close(ends[1]);
  std::string text;
  char part[4096];
  for (ssize_t n; (n = read(ends[0], part, sizeof(part))) > 0;)
    text.append(part, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (status == 0) return text;
  return text.empty() ? "died" : text;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const std::string column = arguments[2];
  const std::map<std::string, int> columns = {
      {"sequential", 0}, {"random", 1}, {"sanitized", 2}, {"raced", 3}, {"raced_across", 4}};
  const auto all = cases();
  auto left_over = all;
  int surprises = 0;
  std::ifstream table(arguments[1]);
  for (std::string line; std::getline(table, line);) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream words(line);
    std::string kernel, defect, expected[5];
    words >> kernel >> defect;
    for (std::string& word : expected)
      words >> word;
    const std::string name = kernel + " " + defect;
    if (all.count(name) == 0) {
      std::printf("%s: no such case\n", name.c_str());
      ++surprises;
      continue;
    }
    std::string word = expected[columns.at(column)];
    left_over.erase(name);
    if (word == "?") continue;
    const bool some = word.rfind("some:", 0) == 0;
    if (some) word = word.substr(5);
    const int runs = column == "random" ? 20 : 1;
    int found = 0;
    std::string first;
    for (int seed = 0; seed < runs; ++seed) {
      const emulate::Order order = column == "random" ? emulate::Order::kRandom : emulate::Order::kSequential;
      const std::string text = report(all.at(name), {order, static_cast<uint64_t>(seed), column == "raced"});
      found += word == "-" ? !text.empty() : text.find(word) != std::string::npos;
      if (first.empty()) first = text;
    }
    if (word == "-" ? found != 0 : some ? found == 0 : found != runs) {
      std::printf("%s: expected %s, found in %d of %d runs; the first report:\n  %s\n", name.c_str(),
                  word.c_str(), found, runs, first.substr(0, 1000).c_str());
      ++surprises;
    }
  }
  for (const auto& [name, run] : left_over) {
    std::printf("%s: not in the table\n", name.c_str());
    ++surprises;
  }
  return surprises == 0 ? 0 : 1;
}
