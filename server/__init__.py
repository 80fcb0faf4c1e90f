"""Find, prepare, run and stop a tritonserver.

```python
from server import TritonServer

with TritonServer("build/model_repository", free_ports=True) as server:
    print(server.http_url, server.grpc_url, server.metrics_url, server.memory_mib())
```
"""

from .access import Access
from .admin_key import AdminKey
from .errors import ServerError, ServerStartError, ServerUsageError
from .installation import Installation, Wheel, find_wheel
from .launcher import TritonServer
from .security import Security
from .serving_tls import ServingTls

__all__ = [
    "AdminKey",
    "Installation",
    "Access",
    "Security",
    "ServerError",
    "ServerStartError",
    "ServerUsageError",
    "ServingTls",
    "TritonServer",
    "Wheel",
    "find_wheel",
]
