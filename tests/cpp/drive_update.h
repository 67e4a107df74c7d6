// The optimizer step over ragged parameters, on buffers of exactly the size they need.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "../../csrc/update.h"
#include "require.h"

namespace {

template <class T>
struct Model {
    using Real = nabla_tau::real_of<T>;
    struct Parameter {
        std::vector<T> value, first, second, forget, retain, centre;
        std::vector<unsigned char> mask;
        float step = 0;
    };
    std::vector<Parameter> parameters;
    std::vector<std::int64_t> table;

    explicit Model(const std::vector<std::size_t>& sizes) : parameters(sizes.size()) {
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        const auto fill = [&](std::vector<T>& values, std::size_t size, bool positive) {
            values.resize(size);
            for (T& value : values) {
                const float drawn = normal(random);
                nabla_tau::store(static_cast<Real>(positive ? std::fabs(drawn) : drawn), value);
            }
        };
        for (std::size_t i = 0; i < sizes.size(); ++i) {
            Parameter& p = parameters[i];
            for (auto* values : {&p.value, &p.first, &p.forget, &p.retain, &p.centre}) fill(*values, sizes[i], false);
            fill(p.second, sizes[i], true);
            for (std::size_t j = 0; j < sizes[i]; ++j) p.mask.push_back(random() % 2);
        }
    }

    // Every third parameter lacks a gradient, every second has a mask.
    nabla_tau::Table rows(bool momentum) {
        using namespace nabla_tau;
        table.assign(parameters.size() * kColumns, 0);
        for (std::size_t i = 0; i < parameters.size(); ++i) {
            Parameter& p = parameters[i];
            std::int64_t* row = &table[i * kColumns];
            const auto point = [&](Column column, const void* to) { row[column] = reinterpret_cast<std::intptr_t>(to); };
            const auto number = [&](Column column, double value) { std::memcpy(row + column, &value, sizeof(value)); };
            point(kParameter, p.value.data());
            if (momentum) point(kFirst, p.first.data());
            point(kSecond, p.second.data());
            if (i % 3 != 1) point(kForget, p.forget.data());
            if (i % 3 != 2) point(kRetain, p.retain.data());
            if (i % 2) point(kMask, p.mask.data());
            point(kCentre, p.centre.data());
            point(kStep, &p.step);
            row[kSize] = static_cast<std::int64_t>(p.value.size());
            row[kNumber] = static_cast<std::int64_t>(i);
            number(kRate, 0.01), number(kDecay, 0.1), number(kSign, i % 2 ? -1 : 1);
            number(kBeta1, i % 2 ? 0.2 : 0.9), number(kBeta2, 0.999), number(kEps, 1e-3);
            number(kMomentum, 0.9), number(kDampening, 0.1), number(kNesterov, i % 2);
        }
        return {table.data(), static_cast<std::int64_t>(parameters.size())};
    }

    std::vector<Real> numbers() const {
        std::vector<Real> all;
        for (const Parameter& p : parameters) {
            for (const auto* values : {&p.value, &p.first, &p.second}) {
                for (const T& value : *values) all.push_back(nabla_tau::load(value));
            }
        }
        return all;
    }
};

template <class T>
void drive_update() {
    using namespace nabla_tau;
    const std::vector<std::size_t> sizes{1, 3, 0, 17, 511, 512, 513, 16384, 16385, 40000};
    const Noise noise{0.1, ~std::uint64_t(0), std::uint64_t(1) << 40};
    for (const bool momentum : {true, false}) {
        for (const Noise* drawn : {static_cast<const Noise*>(nullptr), &noise}) {
            std::vector<real_of<T>> wanted;
            for (const int threads : {1, 2, 5}) {
                Model<T> model(sizes);
                const Table table = model.rows(momentum);
                double products[3];
                gradient_products<T>(table, products, threads);
                const Scales scales{0.5, products[1] / products[2], drawn};
                if (momentum) adamw<T>(table, scales, threads);
                sgd<T>(table, scales, threads);
                const double distance = std::sqrt(squared_distance<T>(table, threads));
                require(distance > 10, "distance");
                pull<T>(table, 10 / distance, threads);
                const auto found = model.numbers();
                for (const auto value : found) require(std::isfinite(value), "update is finite");
                if (wanted.empty()) wanted = found;
                require(found == wanted, "update at any number of threads");
            }
        }
    }
}

}  // namespace
