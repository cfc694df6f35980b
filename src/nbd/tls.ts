/** node:tls, loaded where TLS is wanted: it is much code, and most exports are unix sockets. */
import { createRequire } from 'node:module';

export function loadTls(): typeof import('node:tls') {
  return createRequire(import.meta.url)('node:tls') as typeof import('node:tls');
}
