// Runs recorded launches again, under a sanitizer, and compares what they write with what was recorded.
//
//   replay FOLDER MOST    all files of the folder, of each kernel at most MOST, smallest first; 0: all
//
// A file has, as little-endian numbers of 64 bits unless said otherwise: the kernel's name (length, bytes); grid (3); buffers (count; of
// each its length, its bytes before, its bytes after, and how many of its 64-bit words are addresses of buffers, with their
// numbers); arguments (count; of each a byte for its kind: 0 a value with length and bytes, 1 the number of a buffer, 2 null).
#include "emulate.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>

namespace {

using Bytes = std::vector<uint8_t>;

[[noreturn]] void stop(const std::string& why) {
    std::fprintf(stderr, "replay: %s\n", why.c_str());
    std::_Exit(2);
}

struct Reader {
    Bytes all;
    size_t at = 0;

    explicit Reader(const std::filesystem::path& path) {
        std::ifstream file(path, std::ios::binary);
        all.assign(std::istreambuf_iterator<char>(file), {});
    }
    const uint8_t* take(uint64_t count) {
        if (count > all.size() - at) stop("a file that ends early");
        at += count;
        return all.data() + at - count;
    }
    uint64_t number() {
        uint64_t out;
        std::memcpy(&out, take(8), 8);
        return out;
    }
    Bytes bytes() {
        const uint64_t count = number();
        const uint8_t* from = take(count);
        return {from, from + count};
    }
};

// Memory of exactly its length, so that what lies behind belongs to nobody.
struct Buffer {
    void* memory;
    size_t size;
    Bytes after;
    std::vector<uint64_t> links;
};

void replay(const std::filesystem::path& path) {
    Reader file(path);
    const Bytes name_bytes = file.bytes();
    const std::string name(name_bytes.begin(), name_bytes.end());
    const emulate::Entry* entry = emulate::find(name.c_str());
    if (!entry) stop("no kernel " + name);
    dim3 grid;
    grid.x = static_cast<uint32_t>(file.number());
    grid.y = static_cast<uint32_t>(file.number());
    grid.z = static_cast<uint32_t>(file.number());
    std::vector<Buffer> buffers(file.number());
    for (Buffer& buffer : buffers) {
        const Bytes before = file.bytes();
        buffer.size = before.size();
        if (posix_memalign(&buffer.memory, 16, std::max<size_t>(buffer.size, 1)) != 0) stop("no memory");
        if (buffer.size > 0) std::memcpy(buffer.memory, before.data(), buffer.size);
        buffer.after = file.bytes();
        buffer.links.resize(file.number());
        for (uint64_t& link : buffer.links) link = file.number();
    }
    for (Buffer& buffer : buffers)
        for (size_t i = 0; i < buffer.links.size(); ++i) {
            const auto address = reinterpret_cast<uint64_t>(buffers.at(buffer.links[i]).memory);
            std::memcpy(static_cast<uint8_t*>(buffer.memory) + 8 * i, &address, 8);
        }
    std::vector<Bytes> values(file.number());
    if (values.size() != entry->count) stop("arguments of " + name + " have changed: record again");
    for (Bytes& value : values) {
        const uint8_t kind = *file.take(1);
        if (kind == 0) {
            value = file.bytes();
            continue;
        }
        const uint64_t address = kind == 1 ? reinterpret_cast<uint64_t>(buffers.at(file.number()).memory) : 0;
        value.resize(8);
        std::memcpy(value.data(), &address, 8);
    }
    std::vector<void*> arguments;
    for (size_t i = 0; i < values.size(); ++i) {
        if (values[i].size() != entry->sizes[i]) stop("arguments of " + name + " have changed: record again");
        arguments.push_back(values[i].data());
    }
    const emulate::Launch launch{entry, arguments.data(), grid, {entry->threads, 1, 1}, false};
    std::string why;
    if (!emulate::run(launch, why)) stop(name + ": " + why);
    for (Buffer& buffer : buffers) {
        if (buffer.links.empty() && buffer.size > 0 && std::memcmp(buffer.memory, buffer.after.data(), buffer.size) != 0)
            stop(path.string() + ": " + name + " writes other bytes than were recorded");
        std::free(buffer.memory);
    }
}

std::string kernel_of(const std::filesystem::path& path) {
    const std::string name = path.filename().string();
    return name.substr(0, name.find('.'));
}

} // namespace

int main(int count, char** words) {
    if (count != 3) stop("usage: replay FOLDER MOST");
    std::map<std::string, std::vector<std::filesystem::path>> of_kernel;
    for (const auto& file : std::filesystem::directory_iterator(words[1]))
        if (file.path().extension() == ".case") of_kernel[kernel_of(file.path())].push_back(file.path());
    const size_t most = std::strtoul(words[2], nullptr, 10);
    size_t done = 0;
    for (auto& [kernel, files] : of_kernel) {
        const auto key = [](const auto& path) { return std::pair(std::filesystem::file_size(path), path); };
        std::sort(files.begin(), files.end(), [&](const auto& a, const auto& b) { return key(a) < key(b); });
        for (size_t i = 0; i < files.size() && (most == 0 || i < most); ++i, ++done) replay(files[i]);
    }
    if (done == 0) stop("no cases");
    std::printf("replay: %zu launches of %zu kernels\n", done, of_kernel.size());
    return 0;
}
