#include "vector_math.h"

namespace nabla_tau {

const float Exp<float>::kFloor = -88.0f;
const double Exp<double>::kFloor = -709.0;

}  // namespace nabla_tau
