// bfloat16 as its bits: conversions in integers, which vectorise everywhere.
#pragma once

#include <cstdint>

#include "../portable.h"

namespace attr_batch::cpu {

ATTR_BATCH_HD float widen(float value) { return value; }
ATTR_BATCH_HD double widen(double value) { return value; }
ATTR_BATCH_HD float widen(uint16_t bfloat16) {
  return from_bits(static_cast<uint32_t>(bfloat16) << 16);
}

ATTR_BATCH_HD void narrow(float value, float& to) { to = value; }
ATTR_BATCH_HD void narrow(double value, double& to) { to = value; }
// To nearest, ties to even; a NaN stays one.
ATTR_BATCH_HD void narrow(float value, uint16_t& to) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  to = static_cast<uint16_t>((value != value ? bits | 0x400000 : rounded) >> 16);
}

}  // namespace attr_batch::cpu
